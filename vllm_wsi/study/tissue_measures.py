"""Measures of answers' probabilities and of patches' scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CALIBRATION_BINS = 10


class Bin(NamedTuple):
    """Answers whose confidence lies in one bin."""

    low: float
    high: float
    answers: int
    confidence: float  # mean; NaN without an answer
    accuracy: float


def calibration_bins(confidence: ArrayLike, correct: ArrayLike, bins: int = CALIBRATION_BINS) -> list[Bin]:
    """Confidence against accuracy, in bins of equal width over [0, 1]; an edge belongs to the bin above it.

    Args:
        confidence: [answers], probability of the label that was answered, in [0, 1].
        correct: [answers], bool.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise ValueError(f"found shapes {confidence.shape} and {correct.shape}, wanted two of [answers]")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("confidence: found a value outside 0 to 1, or NaN")
    of_bin = np.minimum((confidence * bins).astype(int), bins - 1)
    found = []
    for place in range(bins):
        inside = of_bin == place
        means = [float(values[inside].mean()) if inside.any() else np.nan for values in (confidence, correct)]
        found.append(Bin(place / bins, (place + 1) / bins, int(inside.sum()), *means))
    return found


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Mean of |accuracy - confidence| over the bins, weighted by their answers (Naeini et al., AAAI 2015), in [0, 1].

    It is biased upwards for few answers: a perfectly calibrated model has about sqrt(bins / answers) / 2.
    """
    filled = [one for one in calibration_bins(confidence, correct, bins) if one.answers]
    if not filled:
        raise ValueError("found no answer, wanted at least one")
    total = sum(one.answers for one in filled)
    return sum(one.answers * abs(one.accuracy - one.confidence) for one in filled) / total


def brier(probabilities: Mapping[str, float], gold: str) -> float:
    """Sum over labels of (p - [label is right])^2 (Brier 1950), in [0, 2]; 0 is perfect.

    For yes or no this is twice (p_yes - [yes])^2.
    """
    return sum((p - (label == gold)) ** 2 for label, p in probabilities.items())


def auc(scores: ArrayLike, is_positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties half. NaN without both."""
    scores, is_positive = np.asarray(scores, np.float64), np.asarray(is_positive, bool)
    positive = int(is_positive.sum())
    negative = len(is_positive) - positive
    if not positive or not negative:
        return float("nan")
    if np.isnan(scores).any():
        raise ValueError("scores: found NaN, wanted numbers")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[is_positive].sum() - positive * (positive + 1) / 2) / (positive * negative))
