"""Prompts with slides, laid out for the decoder: one slide token for each patch, RoPE positions, batches.

Training and the transformers model lay out prompts here; in service vLLM repeats the slide token itself and asks
`serving/model.py` for positions. All three take positions from `selection/positions.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_wsi.selection.positions import SlideSpan, prompt_positions


class PatchRows(NamedTuple):
    """The patches of one slide that the decoder sees, and how many tokens stand for the others."""

    indices: Tensor  # int64 [k], ascending: their rows among the N
    num_patches: int  # N
    num_summary: int = 0  # summary tokens behind them


class PromptLayout(NamedTuple):
    """One prompt of T tokens, with its slides' patches T' tokens long."""

    repeats: Tensor  # int64 [T]: how often each token stands in the laid-out prompt
    positions: Tensor  # int64 [T']


def lay_out(ids: Tensor, slides: Sequence[PatchRows], slide_token_id: int, slide_position_budget: int) -> PromptLayout:
    """Repeats each slide's token once for each of its patches and summary tokens.

    Args:
        ids: int64 [T], on the CPU, with one slide token for each slide.
        slides: in the order of the prompt.
        slide_position_budget: as for `prompt_positions`.

    Raises:
        ValueError: the prompt's slide tokens and the slides differ in number.
    """
    is_slide = ids == slide_token_id
    if (found := int(is_slide.sum())) != len(slides):
        raise ValueError(f"the prompt holds {found} slide tokens, wanted one for each of {len(slides)}")
    repeats = torch.ones_like(ids)
    repeats[is_slide] = torch.tensor([len(slide.indices) + slide.num_summary for slide in slides], dtype=torch.long)
    ends = repeats.cumsum(dim=0)
    starts = (ends - repeats)[is_slide].tolist()
    spans = [SlideSpan(start, *slide) for start, slide in zip(starts, slides, strict=True)]
    positions, _ = prompt_positions(int(repeats.sum()), spans, slide_position_budget)
    return PromptLayout(repeats, positions)


def repeated(row: Tensor, repeats: Tensor) -> Tensor:
    """[T'] of a row [T] on the CPU: each element as often as `repeats` [T] says.

    `Tensor.repeat_interleave` has an OpenMP loop of its own, in which forked processes of a data loader stood still
    where the process that forked them had run vLLM's engine for CPUs before.
    """
    return row[torch.from_numpy(np.repeat(np.arange(len(row)), repeats.numpy()))]


def pad_left(rows: Sequence[Tensor], value: float = 0) -> Tensor:
    """[B, T, ...] of B rows [t, ...]: each is padded at its beginning to the longest, T."""
    length = max(map(len, rows))
    batch = rows[0].new_full((len(rows), length, *rows[0].shape[1:]), value)
    for place, row in zip(batch, rows, strict=True):
        place[length - len(row) :] = row
    return batch
