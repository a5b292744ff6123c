"""The one place where the order of patches is defined.

A patch's key is an int64: its score in the upper 32 bits, mapped so that integers order as the floats do,
and the complement of its row in the lower 32. Keys are therefore unique: the largest keys are the best
scores, a tie goes to the lower row, and any correct top-k of keys, on any device, gives the same set.
"""

from __future__ import annotations

import torch
from torch import Tensor

ABSENT = torch.iinfo(torch.int64).min
"""The key of a patch that may never be kept: its score is NaN or infinite, or there is no such row."""

MAX_ROW = 2**31 - 1
_LOW = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF


def pack_keys(scores: Tensor, first_row: int = 0) -> Tensor:
    """Keys of consecutive rows.

    Args:
        scores: fp32 [n]; NaN and infinities give `ABSENT`, -0.0 counts as 0.0.
        first_row: row of `scores[0]` within the slide; the last row may be at most `MAX_ROW`.

    Returns:
        int64 [n].
    """
    n = scores.shape[0]
    if first_row + n - 1 > MAX_ROW:
        raise ValueError(f"row {first_row + n - 1} does not fit a key, wanted at most {MAX_ROW}")
    bits = (scores.float() + 0.0).view(torch.int32)
    rank = bits ^ ((bits >> 31) & _MAGNITUDE)
    rows = torch.arange(first_row, first_row + n, device=scores.device)
    keys = (rank.long() << 32) | (MAX_ROW - rows)
    return torch.where(torch.isfinite(scores), keys, ABSENT)


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(rows int64 [n], scores fp32 [n]) of keys that are not `ABSENT`; scores come back bit-exactly."""
    rank = (keys >> 32).int()
    bits = rank ^ ((rank >> 31) & _MAGNITUDE)
    return MAX_ROW - (keys & _LOW), bits.view(torch.float32)
