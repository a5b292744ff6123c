"""Which patches of a slide a training step sees: of a long one some of all its parts, others in each epoch; and none
that are not finite."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def draw_from_strata(k: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """One row out of each of k equal parts of n rows, or every row where there are no more than k.

    Over the epochs every row has its turn, while the rows of one epoch stay spread over the slide.

    Args:
        rng: moved on only where rows are left out.

    Returns:
        int64 [min(k, n)], ascending and distinct: the i-th lies in floor(i * n / k) .. floor((i + 1) * n / k) - 1.
    """
    if n <= k:
        return np.arange(n)
    bounds = np.arange(k + 1) * n // k
    return rng.integers(bounds[:-1], bounds[1:])


def finite_rows(features: Tensor) -> Tensor:
    """bool [n] of [n, d]: the patches without NaN and infinities."""
    return torch.isfinite(features).all(dim=1)


def no_finite_patch(name: str) -> str:
    """What is said of a slide of which no patch is finite."""
    return f"{name}: found no patch with finite features, wanted at least one"
