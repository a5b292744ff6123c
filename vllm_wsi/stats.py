"""Statistics of a report: length bins, intervals over slides, paired tests, and measures of a selection."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Hashable, Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

SHRINKAGE = 1e-3
"""Weight of the identity in the shrunk correlation matrix of `gaussian_mutual_information`. It holds a canonical
correlation of 1 at 3.1 nats rather than infinity and takes 0.002 nats off one of 0.8."""

LENGTH_EDGES = (64, 128, 256, 512, 1024, 2048, 4096)
"""In patches; an edge belongs to the bin above it. The bins are those of the paper's figure."""

LENGTH_BINS = (
    f"<{LENGTH_EDGES[0]}",
    *(f"{low}-{high}" for low, high in pairwise(LENGTH_EDGES)),
    f">={LENGTH_EDGES[-1]}",
)
"""Names of the bins of slide length, shortest first: "<64", "64-128", ..., ">=4096"."""


class Interval(NamedTuple):
    """An estimate and the two ends of its confidence interval, all in the unit of the values."""

    estimate: float
    low: float
    high: float


def length_bin(num_patches: int) -> str:
    """The name, of `LENGTH_BINS`, of the bin that a slide of so many patches belongs to."""
    return LENGTH_BINS[bisect_right(LENGTH_EDGES, num_patches)]


def bootstrap_mean(
    values: ArrayLike, groups: Iterable[Hashable], seed: int = 0, draws: int = 2000, level: float = 0.95
) -> Interval:
    """The mean over questions, with the percentile interval of a cluster bootstrap over slides.

    A resample draws as many slides as there are, with replacement, each with all its questions; its mean is that
    over the questions drawn, so a slide counts by its number of questions (Davison and Hinkley, Bootstrap Methods
    and their Application, 1997, section 3.8, strategy 1). Neither the names of the slides nor the order of the
    questions matters. The interval always holds the estimate. It is too narrow where the slides are few, say under
    20, and with one slide every resample is that slide: low = high = estimate, which says nothing about the error.

    Args:
        values: [questions], bool or a real number, finite: right or wrong, or a score, in any unit.
        groups: [questions], the slide of each question, a string or another hashable.
        seed: of the resampling; equal seeds and slides have equal resamples.
        draws: resamples, at least 1. Takes about 16 * draws * slides bytes.
        level: coverage, in (0, 1).

    Raises:
        ValueError: no question, lengths that differ, a value that is not finite, or draws or level out of range.
    """
    values = _questions("values", values)
    sums, counts = _slide_sums(values, groups)
    if draws < 1:
        raise ValueError(f"draws: found {draws}, wanted at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level: found {level}, wanted above 0 and below 1")
    estimate = float(sums.sum() / counts.sum())
    picks = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate))


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    groups: Iterable[Hashable],
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The mean of first - second over the same questions, with its interval; both see the same resamples.

    Args:
        first: [questions], as the values of `bootstrap_mean`.
        second: [questions], of the same questions in the same order.
        groups, seed, draws, level: as in `bootstrap_mean`.

    Raises:
        ValueError: as in `bootstrap_mean`.
    """
    first, second = _pairs(first, second)
    return bootstrap_mean(first - second, groups, seed, draws, level)


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided p of the exact McNemar test: are as many questions right in the first alone as in the second alone?

    It takes the questions for independent; where those of a slide agree, p is too small and `paired_bootstrap` the
    better guide. Without a question on which the two differ, p = 1. Needs SciPy.

    Args:
        first: [questions], right or wrong: bool, or 0 and 1.
        second: [questions], of the same questions in the same order.

    Raises:
        ValueError: no question, lengths that differ, or a value other than 0 and 1.
    """
    first, second = _pairs(first, second)
    if not np.isin([first, second], (0, 1)).all():
        raise ValueError("found a value other than 0 and 1, wanted right or wrong for every question")
    only_first, only_second = int((first > second).sum()), int((first < second).sum())
    if only_first + only_second == 0:
        return 1.0

    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def redundancy(features: ArrayLike) -> float:
    """Mean cosine over all pairs of kept patches, in [-1, 1]; NaN for fewer than two.

    The features are taken as given: foundation models whose features share a large mean score high on any choice of
    patches, so compare within one model only. A patch of zeros has a cosine of 0 with every other.

    Args:
        features: [patches, dim], real.

    Raises:
        ValueError: not two-dimensional.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"features: found shape {list(rows.shape)}, wanted [patches, dim]")
    k = len(rows)
    if k < 2:
        return math.nan
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return float((np.square(unit.sum(0)).sum() - np.square(unit).sum()) / (k * (k - 1)))


def key_patch_recall(kept_rows: ArrayLike, key_patches: ArrayLike, k: int) -> float:
    """Share of the key patches that is kept, of what a budget of k patches could keep, in [0, 1].

    |kept & key| / min(k, |key|): 1 where all k patches are key patches, though there may be more of them. NaN
    without key patches.

    Args:
        kept_rows: [patches], integers from 0, at most k of them. Repeats count once.
        key_patches: [patches], integers from 0: the rows that hold the answer.
        k: the budget in patches, at least 1.

    Raises:
        ValueError: rows that are not one-dimensional, not integers, or below 0, as padding is; k below 1; more than k
            rows kept.
    """
    kept, key = _row_set("kept_rows", kept_rows), _row_set("key_patches", key_patches)
    if k < 1:
        raise ValueError(f"k: found {k}, wanted at least 1")
    if len(kept) > k:
        raise ValueError(f"kept_rows: found {len(kept)} rows, wanted at most k = {k}")
    return len(kept & key) / min(k, len(key)) if key else math.nan


def gaussian_mutual_information(
    x: ArrayLike, y: ArrayLike, num_components: int = 4, permutations: int = 50, seed: int = 0
) -> tuple[float, float]:
    """Linear dependence of two paired sets of vectors, as the mutual information of Gaussians, and its noise level.

    One row is one slide: say the mean of the kept patches' features, and the mean of the dropped ones'. Each set is
    reduced by PCA to num_components. With rho the canonical correlations of the two, shrunk by SHRINKAGE, the raw
    estimate is -1/2 sum(log(1 - rho^2)) in nats. It is biased upwards by about num_components^2 / (2 slides) even
    for independent sets, so its mean over random pairings of the rows is taken off.

    What it is: a measure of how well a linear map predicts the leading components of one set from those of the
    other, across slides; exact for jointly Gaussian components as the slides grow in number.

    What it is not: all the information that the two share. It sees no nonlinear dependence, nothing outside the
    leading components (PCA picks them by variance, not by what is shared), and nothing within a slide. What marks
    the slide as a whole, as stain, scanner and organ do, counts as shared. It needs many more slides than
    components: the least allowed, four times as many, keeps the formula defined, not the result precise; 50 times
    as many is a sound study. Do not compare values of different num_components or numbers of slides.

    Args:
        x: [slides, p], real and finite, one row a slide.
        y: [slides, q], of the same slides in the same order.
        num_components: at least 1; fewer are used where a set has a lower rank.
        permutations: random pairings, at least 1.
        seed: of the pairings.

    Returns:
        (information, noise) in nats: the corrected estimate, about 0 or a little below for independent sets, and the
        95th percentile of the same for random pairings. An estimate up to the noise does not show dependence.

    Raises:
        ValueError: fewer slides than 4 * num_components, numbers of slides that differ, a set that is not
            two-dimensional or not finite, or an argument below 1.
    """
    x, y = _slide_vectors("x", x), _slide_vectors("y", y)
    if len(x) != len(y):
        raise ValueError(f"y: found {len(y)} slides, wanted {len(x)}, as many as in x")
    if num_components < 1 or permutations < 1:
        raise ValueError(f"found {num_components} components and {permutations} permutations, wanted at least 1 each")
    if len(x) < 4 * num_components:
        raise ValueError(f"found {len(x)} slides, wanted at least {4 * num_components}, 4 for each component")
    x, y = _whitened_components(x, num_components), _whitened_components(y, num_components)
    raw = float(_information(x.T @ y))
    order = np.tile(np.arange(len(y)), (permutations, 1))
    order = np.random.default_rng(seed).permuted(order, axis=1)
    null = _information(x.T @ y[order])
    bias = float(null.mean())
    return raw - bias, float(np.quantile(null, 0.95)) - bias


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


def _slide_sums(
    values: NDArray[np.float64], groups: Iterable[Hashable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of the values and number of questions of each slide, both fp64 [slides], sorted by number, then by sum.

    Sorted, they depend neither on the names of the slides nor on the order of the questions.
    """
    numbers: dict[Hashable, int] = {}
    slide = [numbers.setdefault(group, len(numbers)) for group in groups]
    if len(slide) != len(values):
        raise ValueError(f"groups: found {len(slide)}, wanted {len(values)}, one for each question")
    sums = np.bincount(slide, weights=values)
    counts = np.bincount(slide).astype(np.float64)
    order = np.lexsort((sums, counts))
    return sums[order], counts[order]


def _row_set(name: str, rows: ArrayLike) -> set[int]:
    """The distinct rows, checked: [patches], integers from 0."""
    array = np.asarray(rows)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name}: found {array.dtype} {list(array.shape)}, wanted integers [patches]")
    if array.size and array.min() < 0:
        raise ValueError(f"{name}: found {array.min()}, wanted at least 0")
    return set(array.tolist())


def _slide_vectors(name: str, vectors: ArrayLike) -> NDArray[np.float64]:
    """vectors as fp64 [slides, dim], checked: two-dimensional and finite."""
    array = np.asarray(vectors, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name}: found shape {list(array.shape)}, wanted [slides, dim]")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: found {np.count_nonzero(~np.isfinite(array))} NaN or infinite, wanted none")
    return array


def _whitened_components(vectors: NDArray[np.float64], num_components: int) -> NDArray[np.float64]:
    """[slides, components]: the leading principal components, orthonormal columns; none that is mere rounding."""
    left, scale, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    rounding = max(vectors.shape) * np.finfo(np.float64).eps * np.linalg.norm(vectors)
    return left[:, : min(num_components, np.count_nonzero(scale > rounding))]


def _information(cross: NDArray[np.float64]) -> NDArray[np.float64]:
    """[...] in nats, of cross-correlations [..., p, q] between whitened components."""
    if 0 in cross.shape[-2:]:
        return np.zeros(cross.shape[:-2])
    rho = (1 - SHRINKAGE) * np.linalg.svd(cross, compute_uv=False)
    return -0.5 * np.log1p(-np.square(rho)).sum(-1)
