"""Statistics of a report: length bins, intervals over groups and paired tests."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_wsi.errors import needs_extra

LENGTH_EDGES = (64, 128, 256, 512, 1024, 2048, 4096)
"""In patches; an edge belongs to the bin above it. The bins are those of the paper's figure."""

LENGTH_BINS = (
    f"<{LENGTH_EDGES[0]}",
    *(f"{low}-{high}" for low, high in pairwise(LENGTH_EDGES)),
    f">={LENGTH_EDGES[-1]}",
)
"""Names of the bins of slide length, shortest first: "<64", "64-128", ..., ">=4096"."""

EXACT_GROUPS = 16
"""The most groups of which `paired_p` counts every pattern of signs."""


class Interval(NamedTuple):
    """An estimate and the two ends of its confidence interval, all in the unit of the values."""

    estimate: float
    low: float
    high: float


def length_bin(num_patches: int) -> str:
    """The name, of `LENGTH_BINS`, of the bin that a slide of so many patches belongs to."""
    return LENGTH_BINS[bisect_right(LENGTH_EDGES, num_patches)]


def proportion_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """The share successes / n with the exact interval of Clopper and Pearson (1934): 24 of 24 is [0.858, 1].

    The n trials are taken for independent. Coverage is at least `level` for every true share. Needs SciPy.

    Args:
        successes: 0 to n.
        n: trials, at least 1.
        level: coverage, in (0, 1).

    Raises:
        ValueError: an argument out of range.
        SetupError: SciPy is not installed.
    """
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"found {successes} successes of {n}, wanted 0 to n of n, and n at least 1")
    exact = _binomial_test(successes, n).proportion_ci(level, method="exact")
    return Interval(successes / n, float(exact.low), float(exact.high))


# Many parameters: the values, what is known of them, and the resampling.
def mean_interval(
    values: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The mean over questions with its interval; the groups, say slides, are the independent units.

    - Right or wrong (every value 0 or 1), one question a group: exact (`proportion_interval`).
    - Else the BCa bootstrap over groups (Efron, Better bootstrap confidence intervals, 1987). A resample draws as many
      groups as there are, with replacement, each with all its questions; its mean is that over the questions drawn
      (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8, strategy 1). It is too
      narrow where the groups are few, say under 20.
    - All n groups have the same mean c (or there is one group): every resample is the same, which says nothing of
      what was not seen. A value with less than q = ((1 - level) / 2)^(1 / n) of the mass would hardly be all that n
      groups show; what the other 1 - q may hold, `bounds` limit. The interval is q c + (1 - q) bounds. For n right
      answers of n it is that of Clopper and Pearson.

    Neither the names of the groups nor the order of the questions matters. The interval always holds the estimate.

    Args:
        values: [questions], bool or a real number, finite: right or wrong, or a score.
        groups: [questions], the group of each question, a string or another hashable. None: each its own.
        bounds: the least and the most that a value can be; -inf and inf where there is no limit.
        seed: of the resampling; equal seeds and groups have equal resamples.
        draws: resamples, at least 1. Takes about 16 * draws * groups bytes.
        level: coverage, in (0, 1).

    Raises:
        ValueError: no question, lengths that differ, a value that is not finite or out of bounds, or draws or level
            out of range.
    """
    values = _questions("values", values)
    _check_level(level)
    if draws < 1:
        raise ValueError(f"draws: found {draws}, wanted at least 1")
    if values.min() < bounds[0] or values.max() > bounds[1]:
        raise ValueError(f"values: found {values.min():g} to {values.max():g}, wanted {bounds[0]:g} to {bounds[1]:g}")
    sums, counts = _group_sums(values, range(len(values)) if groups is None else groups)
    if bounds == (0, 1) and len(sums) == len(values) and np.isin(values, (0, 1)).all():
        return proportion_interval(int(values.sum()), len(values), level)
    estimate = float(sums.sum() / counts.sum())
    if np.ptp(sums / counts) <= 1e-12 * max(1.0, abs(estimate)):
        seen = ((1 - level) / 2) ** (1 / len(sums))
        low, high = (seen * estimate + (1 - seen) * bound for bound in bounds)
    else:
        low, high = _bca(sums, counts, np.random.default_rng(seed), draws, level)
    return Interval(estimate, min(low, estimate), max(high, estimate))


# Many parameters: those of `mean_interval`, and the second values.
def paired_interval(
    first: ArrayLike,
    second: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The mean of first - second over the same questions, as `mean_interval`; both see the same resamples.

    Args:
        first: [questions], as the values of `mean_interval`.
        second: [questions], of the same questions in the same order.
        groups, seed, draws, level: as in `mean_interval`.
        bounds: of first and of second; the difference is taken to lie within those that follow.

    Raises:
        ValueError: as in `mean_interval`.
    """
    first, second = _pairs(first, second)
    span = bounds[1] - bounds[0]
    return mean_interval(first - second, groups, (-span, span), seed, draws, level)


def paired_p(
    first: ArrayLike,
    second: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    seed: int = 0,
    draws: int = 9999,
) -> float:
    """Two-sided p of the paired sign-flip test: is the sum of first - second as expected if the two were exchangeable?

    The sum of each group flips its sign at random. Of up to 16 groups that differ, all sign patterns are counted, so
    that the least p of n groups is 2 / 2^n: 1/16 of five seeds. Of more, `draws` random patterns are, and
    p = (patterns at least as extreme + 1) / (draws + 1), never 0. Right or wrong with one question a group is the
    exact McNemar test, in closed form (`mcnemar`). Where no group differs, p = 1.

    Args:
        first: [questions], bool or a real number, finite.
        second: [questions], of the same questions in the same order.
        groups: [questions], the independent units, say slides or seeds. None: each question is one.
        seed: of the random patterns.
        draws: random patterns, at least 1.

    Raises:
        ValueError: no question, lengths that differ, a value that is not finite, or draws below 1.
    """
    first, second = _pairs(first, second)
    if draws < 1:
        raise ValueError(f"draws: found {draws}, wanted at least 1")
    sums, _ = _group_sums(first - second, range(len(first)) if groups is None else groups)
    if len(sums) == len(first) and np.isin([first, second], (0, 1)).all():
        return mcnemar(first, second)
    scale = float(np.abs([first, second]).max())  # differences below its rounding are none
    sums = sums[np.abs(sums) > 1e-12 * scale]
    least = abs(sums.sum()) - 1e-9 * scale
    if len(sums) <= EXACT_GROUPS:
        signs = 1 - 2 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1)
        return float((np.abs(signs @ sums) >= least).mean())
    rng, extreme = np.random.default_rng(seed), 0
    for start in range(0, draws, 1000):
        signs = 1 - 2 * rng.integers(2, size=(min(1000, draws - start), len(sums)))
        extreme += int((np.abs(signs @ sums) >= least).sum())
    return (extreme + 1) / (draws + 1)


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided p of the exact McNemar test: are as many questions right in the first alone as in the second alone?

    It takes the questions for independent; where those of a slide agree, p is too small and `paired_p` over slides
    the right test. Without a question on which the two differ, p = 1. Needs SciPy.

    Args:
        first: [questions], right or wrong: bool, or 0 and 1.
        second: [questions], of the same questions in the same order.

    Returns:
        p in (0, 1]; one below the least normal float is given as that (2.2e-308).

    Raises:
        ValueError: no question, lengths that differ, or a value other than 0 and 1.
        SetupError: SciPy is not installed.
    """
    first, second = _pairs(first, second)
    if not np.isin([first, second], (0, 1)).all():
        raise ValueError("found a value other than 0 and 1, wanted right or wrong for every question")
    only_first, only_second = int((first > second).sum()), int((first < second).sum())
    if only_first + only_second == 0:
        return 1.0
    return max(float(_binomial_test(only_first, only_first + only_second).pvalue), sys.float_info.min)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values, corrected for being many, by Holm (1979); holds whatever the dependence between the tests.

    Args:
        ps: of all tests that were made, in any order; each in [0, 1].

    Returns:
        In the same order: the least level, in [0, 1], at which each would be rejected with the chance of any false
        rejection held at that level.

    Raises:
        ValueError: a p that is NaN or out of range.
    """
    array = np.asarray(ps, dtype=np.float64)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"ps: found {list(ps)}, wanted each in [0, 1]")
    order = np.argsort(array, kind="stable")
    stepped = np.maximum.accumulate(array[order] * np.arange(len(array), 0, -1))
    corrected = np.empty_like(array)
    corrected[order] = np.minimum(stepped, 1)
    return corrected.tolist()


def p_text(p: float) -> str:
    """A p-value as a page shows it: two significant digits, and "< 0.0001" below that; never 0."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _questions(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """values as fp64 [questions], checked: one-dimensional, not empty, finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: found shape {list(array.shape)}, wanted [questions]")
    if not len(array):
        raise ValueError("found no question, wanted at least one")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: found {np.count_nonzero(~np.isfinite(array))} NaN or infinite, wanted none")
    return array


def _pairs(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as fp64 [questions], of one length."""
    first, second = _questions("first", first), _questions("second", second)
    if len(first) != len(second):
        raise ValueError(f"second: found {len(second)} questions, wanted {len(first)}, as many as in first")
    return first, second


def _group_sums(
    values: NDArray[np.float64], groups: Iterable[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of the values and number of questions of each group, both fp64 [groups], sorted by number, then by sum.

    Sorted, they depend neither on the names of the groups nor on the order of the questions.
    """
    numbers: dict[Hashable, int] = {}
    group_of = [numbers.setdefault(group, len(numbers)) for group in groups]
    if len(group_of) != len(values):
        raise ValueError(f"groups: found {len(group_of)}, wanted {len(values)}, one for each question")
    sums = np.bincount(group_of, weights=values)
    counts = np.bincount(group_of).astype(np.float64)
    order = np.lexsort((sums, counts))
    return sums[order], counts[order]


def _bca(
    sums: NDArray[np.float64], counts: NDArray[np.float64], rng: np.random.Generator, draws: int, level: float
) -> tuple[float, float]:
    """The ends of the bias-corrected and accelerated interval of sums / counts over resampled groups.

    The acceleration is that of the jackknife over groups. A bias correction beyond the resamples (the estimate at one
    end of all of them) is held at half a resample.
    """
    normal, total, number = NormalDist(), sums.sum(), counts.sum()
    picks = rng.integers(len(sums), size=(draws, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    below = ((means < total / number).sum() + (means <= total / number).sum()) / (2 * draws)
    bias = normal.inv_cdf(float(np.clip(below, 0.5 / draws, 1 - 0.5 / draws)))
    left_out = (total - sums) / (number - counts)
    spread = left_out.mean() - left_out
    acceleration = float((spread**3).sum() / (6 * (spread**2).sum() ** 1.5))
    shares = []
    for side in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + normal.inv_cdf(side)
        shares.append(normal.cdf(bias + shifted / max(1 - acceleration * shifted, 1e-9)))
    low, high = np.quantile(means, shares)
    return float(low), float(high)


def _binomial_test(successes: int, n: int) -> Any:
    with needs_extra("eval"):  # here, as the package without extras has no SciPy
        from scipy.stats import binomtest
    return binomtest(int(successes), int(n), 0.5)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: found {level}, wanted above 0 and below 1")
