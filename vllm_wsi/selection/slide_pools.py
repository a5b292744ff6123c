"""Means of a slide's patches, which stand for the patches that a selection drops (`summary_tokens`).

A Top-K that looks for findings shows findings; nothing tells of the rest of the slide, or how much of it there is. A
mean of many patches holds the shares of what they show. docs/conditioned.md has what was measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 2.0**-16
BLOCK_ROWS = 256  # that stay in a core's cache; a GPU takes a whole chunk


class SlidePools:
    """Sums of a slide's patches in S pools: patch i belongs to pool i mod S.

    A patch counts by its normalised features (`normalised`), so that a loud one weighs no more than another. They are
    rounded to multiples of 2^-16 and added in fp64. So the sums are exact: no cut into chunks, no order of adding and
    no subtraction changes a bit. A patch whose features are not finite belongs to no pool.

    Args:
        sums: fp64 [S, d].
        counts: int64 [S], patches in each pool.
    """

    def __init__(self, sums: Tensor, counts: Tensor) -> None:
        self.sums, self.counts = sums, counts

    @classmethod
    def empty(cls, count: int, feature_dim: int, device: torch.device | str = "cpu") -> SlidePools:
        """S pools without a patch."""
        sums = torch.zeros(count, feature_dim, dtype=torch.float64, device=device)
        return cls(sums, torch.zeros(count, dtype=torch.int64, device=device))

    def cpu(self) -> SlidePools:
        return SlidePools(self.sums.cpu(), self.counts.cpu())

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes + self.counts.nbytes

    def add(self, indices: Tensor, features: Tensor) -> None:
        """Adds patches.

        Args:
            indices: int64 [n], their rows among the N.
            features: [n, d], of any floating dtype.
        """
        for start in range(0, len(features), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            rows, finite = on_grid(features[part])
            pools = indices[part] % len(self.counts)
            self.sums.index_add_(0, pools, rows.double() * STEP)
            self.counts.index_add_(0, pools, finite.long())

    def add_chunk(self, first_row: int, chunk: Tensor) -> None:
        """Adds the patches of a chunk [n, d], rows first_row to first_row + n, which lies on the pools' device."""
        count = len(self.counts)
        block_rows = count * max(1, (len(chunk) if chunk.is_cuda else BLOCK_ROWS) // count)
        for start in range(0, len(chunk), block_rows):
            rows, finite = on_grid(chunk[start : start + block_rows])
            whole = len(rows) // count
            rest = len(rows) - whole * count
            sums = rows[: whole * count].view(whole, count, rows.shape[1]).sum(dim=0, dtype=torch.float64)
            counts = finite[: whole * count].view(whole, count).sum(dim=0)
            sums[:rest] += rows[whole * count :]
            counts[:rest] += finite[whole * count :]
            shift = (first_row + start) % count  # the pool of the block's first row
            self.sums += sums.roll(shift, dims=0) * STEP
            self.counts += counts.roll(shift)

    def without(self, indices: Tensor, features: Tensor) -> SlidePools:
        """These pools without some of their patches, on the CPU; arguments as for `add`.

        Sums that a GPU made may keep up to 2^-16 of each patch in each feature: its normalised features may differ in
        their last bit.
        """
        taken = SlidePools.empty(*self.sums.shape)
        taken.add(indices.cpu(), features.cpu())
        whole = self.cpu()
        return SlidePools(whole.sums - taken.sums, whole.counts - taken.counts)

    def means(self) -> Tensor:
        """fp32 [s, d]: the mean of each pool that holds a patch, in the pools' order, s <= S."""
        filled = self.counts > 0
        return (self.sums[filled] / self.counts[filled, None]).float()


def on_grid(features: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised patches in units of `STEP`.

    Returns:
        fp32 [n, d], whole numbers, 0 in a patch that is not finite; bool [n], which patches are finite.
    """
    rows = (normalised(features) / STEP).round_()
    finite = torch.isfinite(rows.sum(dim=1))  # no row overflows: a normalised feature is at most sqrt(d)
    if not finite.all():
        rows[~finite] = 0
    return rows, finite


def normalised(features: Tensor) -> Tensor:
    """fp32 [n, d]: each patch at mean 0 and variance 1, as a projector with `input_norm` reads it."""
    return F.layer_norm(features.float(), features.shape[-1:])


def open_pools(summary_tokens: int, feature_dim: int, device: torch.device | str) -> SlidePools | None:
    """Empty pools of a slide that is going to be read; None where there are no summary tokens."""
    return SlidePools.empty(summary_tokens, feature_dim, device) if summary_tokens else None


def filled_pools(pools: SlidePools | None) -> SlidePools | None:
    """On the CPU."""
    return None if pools is None else pools.cpu()


class SlideScores(NamedTuple):
    """What of a slide serves every K and question, so that the slide need not be read again."""

    scores: Tensor  # fp32 [N] of all patches; of a `QuestionScorer` their vectors [N, R]
    pools: SlidePools | None = None  # of all patches; None: the selector makes no summary tokens

    @property
    def nbytes(self) -> int:
        return self.scores.nbytes + (0 if self.pools is None else self.pools.nbytes)
