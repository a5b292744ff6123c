"""What validation tells of a checkpoint's scores and answers: `calibration.json`, which `vllm-wsi calibrate` writes.

Two numbers are said of a slide, beside its selection:

- sufficiency: the probability that the slide shows what its questions ask for. Platt's logistic fit (Platt, 1999), on
  validation slides with and without, of the mean of the best scores and of ln N: the best of many patches score higher
  than the best of few, whatever they show.
- in_distribution: the share of validation slides whose scores lie at least as far from those of the training slides as
  this slide's do: a conformal p-value (Vovk et al., Algorithmic Learning in a Random World, 2005). Below 0.01 at most
  one in a hundred slides like those of validation would be told to be unlike them. Two distances are looked at, and the
  smaller p counts, doubled: of the body (Anderson and Darling's weighted mean square), and of the upper tail, where
  look-alikes of a finding are. A slide is compared with those of its own length alone (a Mondrian conformal p-value):
  the few patches of a finding are a large share of a short slide's tail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vllm_wsi.settings import Settings

from .score_summary import BODY_LEVELS, LEVELS, NUM_BODY, TAIL_LEVELS, ScoreSummary
from .selection import Selection

USUAL = 0.01
"""Slides with a lower `in_distribution` are called unlike those of validation."""
ABSENT = 0.5
"""Sufficiency below which a slide more likely lacks what is asked for."""
TRAINING_LEVELS = (*LEVELS, 0.995, 0.998, 0.999, 1.0)
"""Of the training scores' quantiles: a slide's own lie beyond those of the same level, too."""
LEAST_SHARE = 1e-4
"""Of the training scores beyond a quantile, below which shares are not told apart."""


class Distances(NamedTuple):
    """How far a slide's scores lie from those of the training slides."""

    body: float
    tail: float


class UsualScores(Settings, frozen=True):
    """What is usual among slides of some length."""

    max_patches: int = Field(ge=1)  # of these slides; the last group is that of all longer ones too
    # At `TRAINING_LEVELS`.
    training_scores: tuple[float, ...] = Field(min_length=len(TRAINING_LEVELS), max_length=len(TRAINING_LEVELS))
    body_distances: tuple[float, ...] = Field(min_length=1)  # of validation slides, ascending
    tail_distances: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> UsualScores:
        for name in ("body_distances", "tail_distances"):
            if list(getattr(self, name)) != sorted(getattr(self, name)):
                raise ValueError(f"{name}: found numbers out of order, wanted ascending ones")
        of_level = [score for _, score in sorted(zip(TRAINING_LEVELS, self.training_scores, strict=True))]
        if of_level != sorted(of_level):
            raise ValueError("training_scores: found numbers out of the order of their levels, wanted rising quantiles")
        return self

    def share_as_far(self, summary: ScoreSummary) -> float:
        """The p-value, in (0, 1], of a slide that is like those of validation."""
        found = distances(summary.quantiles.numpy(), self.training_scores)
        shares = _share_beyond(found.body, self.body_distances), _share_beyond(found.tail, self.tail_distances)
        return min(1.0, 2 * min(shares))


class Calibration(Settings, frozen=True):
    """What was fitted on validation; a checkpoint without it says neither number."""

    scorer: str  # digest of the scorer's weights (`scorer_digest`): of another scorer nothing here is true
    temperature: float = Field(gt=0)  # the answers' log-probabilities are divided by it (Guo et al., 2017)
    best_weight: float = Field(ge=0)
    log_patches_weight: float
    bias: float
    enough: float = Field(ge=0, le=1)  # sufficiency of 95 % of the validation slides that show what is asked for
    usual: tuple[UsualScores, ...] = Field(min_length=1)  # the shortest slides first
    num_slides: int = Field(ge=1)  # of validation
    num_patches: tuple[int, int]  # of the shortest and of the longest validation slide

    @model_validator(mode="after")
    def _shortest_first(self) -> Calibration:
        if (ends := [one.max_patches for one in self.usual]) != sorted(set(ends)):
            raise ValueError(f"usual: found groups of up to {ends} patches, wanted the shortest slides first")
        return self

    def sufficiency(self, summary: ScoreSummary, num_patches: int) -> float:
        """The probability, in (0, 1), that a slide of N patches shows what is asked for."""
        logit = self.best_weight * summary.best + self.log_patches_weight * math.log(num_patches) + self.bias
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, logit))))

    def in_distribution(self, summary: ScoreSummary, num_patches: int) -> float:
        """The p-value, in (0, 1], of a slide that is like those of validation of about its length."""
        fitting = [one for one in self.usual if num_patches <= one.max_patches]
        return (fitting[0] if fitting else self.usual[-1]).share_as_far(summary)

    def warnings(self, summary: ScoreSummary, num_patches: int) -> list[str]:
        """In words, what both numbers mean where they mean trouble."""
        found = []
        sufficiency, usual = self.sufficiency(summary, num_patches), self.in_distribution(summary, num_patches)
        if usual < USUAL:
            found.append("This slide is unlike those that the model was checked on: trust neither answer nor patches.")
        if sufficiency < min(self.enough, ABSENT):
            found.append("No patch of this slide stands out: what is asked for is probably not on it.")
        elif sufficiency < self.enough:
            found.append("The patches stand out less than on 95 % of the slides that show what is asked for.")
        low, high = self.num_patches
        if not low <= num_patches <= high:
            found.append(f"Slides of {num_patches} patches were not checked ({low} to {high} were).")
        return found


class Trust(NamedTuple):
    """How far a selection and an answer from it can be trusted; None and () where nothing was fitted."""

    sufficiency: float | None = None
    in_distribution: float | None = None
    answer_temperature: float | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, calibration: Calibration | None, chosen: Selection) -> Trust:
        """Of a slide's selection, whatever its K."""
        summary, n = chosen.summary, chosen.num_patches
        if calibration is None or summary is None:
            return cls()
        return cls(
            round(calibration.sufficiency(summary, n), 4),
            round(calibration.in_distribution(summary, n), 6),  # 2 of 201 stays below `USUAL`
            round(calibration.temperature, 4),
            tuple(calibration.warnings(summary, n)),
        )


def distances(quantiles: NDArray, training_scores: Sequence[float]) -> Distances:
    """How far a slide's quantiles at `LEVELS` lie from the training slides'.

    Body: sqrt(mean over `BODY_LEVELS` u of (F - u)^2 / (u (1 - u))), where F is the share of training scores below the
    slide's u-quantile. Tail: the largest |ln((1 - F) / (1 - u))| at `TAIL_LEVELS`.
    """
    order = np.argsort(TRAINING_LEVELS, kind="stable")
    levels = np.array(TRAINING_LEVELS)
    below = np.interp(quantiles, np.array(training_scores)[order], levels[order], left=0.0, right=1.0)
    body, tail = np.array(BODY_LEVELS), np.array(TAIL_LEVELS)
    squares = (below[:NUM_BODY] - body) ** 2 / (body * (1 - body))
    beyond = np.maximum(1 - below[NUM_BODY:], LEAST_SHARE)
    return Distances(float(np.sqrt(squares.mean())), float(np.abs(np.log(beyond / (1 - tail))).max()))


def _share_beyond(distance: float, known: Sequence[float]) -> float:
    """Conformal: the slide itself is one of those that lie as far."""
    farther = len(known) - int(np.searchsorted(known, distance, side="left"))
    return (farther + 1) / (len(known) + 1)
