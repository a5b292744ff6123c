"""What a slide's scores say of the slide itself: how high its best patches score, and how all scores are spread."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .evenly_spaced import evenly_spaced

NUM_BEST = 4
"""Patches whose scores `ScoreSummary.best` is the mean of: one alone may be chance, and many may not be there."""
NUM_BODY = 64
BODY_LEVELS = tuple((i + 0.5) / NUM_BODY for i in range(NUM_BODY))
TAIL_LEVELS = (0.9, 0.95, 0.98, 0.99)
LEVELS = BODY_LEVELS + TAIL_LEVELS
"""Of `ScoreSummary.quantiles`."""
SAMPLED = 16_384
"""The most scores that quantiles are taken of: to sort a million would take longer than to score a small slide."""


class ScoreSummary(NamedTuple):
    """Of the scores of one slide's patches, the dropped ones too."""

    best: float  # mean of the `NUM_BEST` highest finite scores, or of all where there are fewer
    quantiles: Tensor  # fp32 [len(LEVELS)] of the finite scores at `LEVELS`


def score_summary(scores: Tensor, spread: Tensor | None = None) -> ScoreSummary | None:
    """The summary of a slide; None where no score is finite.

    Args:
        scores: fp32 [N] of all patches.
        spread: fp32 [N], the scores whose quantiles are wanted, where they are others: those that no question has a
            part in, so that the same slide has the same spread whatever is asked.
    """
    spread = sampled_scores(scores if spread is None else spread)
    finite = scores[torch.isfinite(scores)]
    if not len(finite) or not len(spread):
        return None
    best = finite.topk(min(NUM_BEST, len(finite))).values
    return ScoreSummary(float(best.mean()), torch.quantile(spread, torch.tensor(LEVELS)))


def sampled_scores(scores: Tensor, most: int = SAMPLED) -> Tensor:
    """The finite scores, or `most` of them at evenly spaced places."""
    finite = scores[torch.isfinite(scores)]
    return finite[evenly_spaced(most, len(finite))]
