"""Measures of a selection: how alike the kept patches are, and how many of the key patches are among them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


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


def _row_set(name: str, rows: ArrayLike) -> set[int]:
    """The distinct rows, checked: [patches], integers from 0."""
    array = np.asarray(rows)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name}: found {array.dtype} {list(array.shape)}, wanted integers [patches]")
    if array.size and array.min() < 0:
        raise ValueError(f"{name}: found {array.min()}, wanted at least 0")
    return set(array.tolist())
