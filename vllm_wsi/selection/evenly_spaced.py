"""Evenly spaced patches: what the uniform policy keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def evenly_spaced(k: int, n: int) -> Tensor:
    """The middle row of each of k equal parts of n rows, or every row where there are no more than k.

    Returns:
        int64 [min(k, n)], ascending and distinct: the i-th is floor((i + 0.5) * n / k).
    """
    k = min(k, n)
    return (2 * torch.arange(k) + 1) * n // (2 * k)
