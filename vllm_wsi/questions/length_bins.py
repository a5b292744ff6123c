"""The bins of slide length that reports and studies group questions by."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

LENGTH_EDGES = (64, 128, 256, 512, 1024, 2048, 4096)
"""In patches; an edge belongs to the bin above it. The bins are those of the paper's figure."""

LENGTH_BINS = (
    f"<{LENGTH_EDGES[0]}",
    *(f"{low}-{high}" for low, high in pairwise(LENGTH_EDGES)),
    f">={LENGTH_EDGES[-1]}",
)
"""Names of the bins of slide length, shortest first: "<64", "64-128", ..., ">=4096"."""


def length_bin(num_patches: int) -> str:
    """The name, of `LENGTH_BINS`, of the bin that a slide of so many patches belongs to."""
    return LENGTH_BINS[bisect_right(LENGTH_EDGES, num_patches)]
