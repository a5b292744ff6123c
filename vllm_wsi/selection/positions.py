"""RoPE positions of kept patches, the same rule for training (`modeling.py`) and serving (`serving/model.py`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SlideSpan(NamedTuple):
    """Where one slide stands in a prompt."""

    start: int  # index of its first slide token within the prompt
    indices: Tensor  # int64 [k], ascending: rows of the kept patches
    num_patches: int  # N
    num_summary: int = 0  # summary tokens, which follow the patches


def slide_offsets(indices: Tensor, num_patches: int, span: int) -> Tensor:
    """Positions of one slide's kept patches relative to the slide's start.

    A patch keeps its place among the N, scaled by span / N: `floor(index * span / N)`, then moved by the least
    that keeps the positions strictly increasing and inside the span. With span = N this is the index itself
    (original positions), with span = k it is 0 .. k-1 (packed positions).

    Args:
        indices: int64 [k], ascending, distinct.
        num_patches: N.
        span: positions that the slide takes, k <= span <= N.

    Returns:
        int64 [k], strictly increasing, within [0, span).
    """
    k = indices.shape[0]
    rank = torch.arange(k, device=indices.device)
    place = indices * span // num_patches
    place = torch.cummax(place - rank, dim=0).values + rank if k else place
    return torch.minimum(place, span - k + rank)


def prompt_positions(num_tokens: int, slides: list[SlideSpan], slide_position_budget: int) -> tuple[Tensor, int]:
    """Positions of a whole prompt.

    Text is counted one by one. All slides of a prompt share `slide_position_budget` positions, first come, first
    served: a slide's patches take min(N, what is left), but never less than k. Its summary tokens follow, one position
    each, for which room is left first: they have no place on the slide. A slide's positions thus depend only on what
    precedes it, as prefix caching demands.

    Args:
        num_tokens: tokens of the prompt, slide tokens included.
        slides: in the order of the prompt.
        slide_position_budget: 0 gives packed positions.

    Returns:
        (positions int64 [num_tokens], delta): a token generated at index i stands at position i + delta.
    """
    positions = torch.arange(num_tokens)
    delta = 0
    left = slide_position_budget
    for slide in slides:
        k = slide.indices.shape[0]
        span = max(k, min(slide.num_patches, left - slide.num_summary))
        left -= span + slide.num_summary
        stop = slide.start + k
        positions[slide.start : stop] = slide.start + delta + slide_offsets(slide.indices, slide.num_patches, span)
        positions[stop:] += span - k
        delta += span - k
    return positions, delta
