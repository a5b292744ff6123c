"""How well confidence tells right answers from wrong ones: calibration error, and risk against coverage."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_BINS = 10


class RiskCoverage(NamedTuple):
    """What is wrong among the answers that are kept, when the least confident ones are withheld first."""

    coverage: NDArray[np.float64]  # [n], ascending: 1 / n .. 1
    risk: NDArray[np.float64]  # [n], share of wrong answers among the kept ones

    @property
    def area(self) -> float:
        """The mean risk over all coverages (AURC; Geifman and El-Yaniv, Selective Classification, 2017)."""
        return float(self.risk.mean())

    def risk_at(self, coverage: float) -> float:
        """The risk where at least this share of the answers is kept, in (0, 1]."""
        return float(self.risk[int(np.searchsorted(self.coverage, coverage - 1e-9))])


def risk_coverage(correct: ArrayLike, confidence: ArrayLike) -> RiskCoverage:
    """The curve of some answers.

    Answers of equal confidence cannot be told apart, so each of them counts as their mean does.

    Args:
        correct: [n], right or wrong.
        confidence: [n], any number that is higher where an answer is trusted more.

    Raises:
        ValueError: no answer, lengths that differ, or a confidence that is not finite.
    """
    right, trust = _answers(correct, confidence)
    order = np.argsort(-trust, kind="stable")
    right, trust = right[order], trust[order]
    starts = np.flatnonzero(np.r_[True, trust[1:] != trust[:-1]])
    sizes = np.diff(np.r_[starts, len(right)])
    means = np.repeat(np.add.reduceat(right, starts) / sizes, sizes)
    kept = np.arange(1, len(right) + 1)
    return RiskCoverage(kept / len(right), 1 - np.cumsum(means) / kept)


def calibration_error(correct: ArrayLike, probability: ArrayLike, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error: mean |share that is right - mean probability| over bins of equal numbers of answers
    (Nixon et al., Measuring Calibration in Deep Learning, 2019), weighted by their sizes.

    Args:
        correct: [n], right or wrong.
        probability: [n], in [0, 1], that the answer is right.

    Raises:
        ValueError: no answer, lengths that differ, or a probability out of range.
    """
    right, trust = _answers(correct, probability)
    if trust.min() < 0 or trust.max() > 1:
        raise ValueError(f"probability: found {trust.min():g} to {trust.max():g}, wanted 0 to 1")
    order = np.argsort(trust, kind="stable")
    bins = [part for part in np.array_split(order, num_bins) if len(part)]
    return float(sum(abs(right[part].mean() - trust[part].mean()) * len(part) for part in bins) / len(right))


def _answers(correct: ArrayLike, confidence: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    right, trust = np.asarray(correct, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    if right.ndim != 1 or right.shape != trust.shape or not len(right):
        raise ValueError(f"found shapes {right.shape} and {trust.shape}, wanted [n] twice, n at least 1")
    if not np.isfinite(trust).all():
        raise ValueError("confidence: found NaN or infinity, wanted finite numbers")
    return right, trust
