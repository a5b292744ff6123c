"""Pooled means of a slide's patches in one streamed pass: a prototype, for `bench.study.summary_tokens`.

The centres come from a sample: 1,024 evenly spaced rows, a start by farthest points, eight rounds of Lloyd. Then one
pass over all rows gives each to its nearest centre and adds it there. What it finds are bits that depend on nothing but
the slide: a row meets the same matrix product however the slide is cut (`map_blocks`), and sums are exact. For that,
normalised features are rounded to multiples of 2^-16 and added in fp64: up to 2^53 / 2^16 / sqrt(d) rows, no order of
adding and no subtraction of the kept patches changes a bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_wsi.kernels import block_rows, map_blocks
from vllm_wsi.selection.slide_pools import STEP, normalised

SAMPLE, ROUNDS, PRICE_ROUNDS = 1024, 8, 60


class Centres(NamedTuple):
    """A row belongs to the centre c with the least |c|^2 / 2 - x.c + price."""

    points: Tensor  # fp32 [S, d]
    offsets: Tensor  # fp32 [S], |c|^2 / 2 + price


class Pools(NamedTuple):
    """Sums of the rows of each centre."""

    sums: Tensor  # fp64 [S, d], exact
    counts: Tensor  # int64 [S]

    def without(self, rows: Tensor, labels: Tensor) -> Pools:
        """These pools without some of their rows."""
        taken = pooled(rows, labels, len(self.counts))
        return Pools(self.sums - taken.sums, self.counts - taken.counts)

    def means(self) -> Tensor:
        """fp32 [S, d]; 0 where a pool is empty."""
        return (self.sums / self.counts.clamp_min(1)[:, None]).float()


def sample_centres(sample: Tensor, count: int, equal: bool = False) -> Centres:
    """Centres of a sample, normalised [m, d].

    Args:
        count: S.
        equal: prices make the pools of the sample about equally large.
    """
    chosen = [int((sample - sample.mean(dim=0)).square().sum(dim=1).argmin())]
    nearest = torch.full((len(sample),), torch.inf)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (sample - sample[chosen[-1]]).square().sum(dim=1))
        chosen.append(int(nearest.argmax()))
    points = sample[chosen]
    for _ in range(ROUNDS):
        found = pooled(sample, labels_of(sample, _centres(points)), count)
        points = torch.where(found.counts[:, None] > 0, found.means(), points)
    centres = _centres(points)
    return _with_prices(sample, centres) if equal else centres


def _centres(points: Tensor) -> Centres:
    return Centres(points, points.square().sum(dim=1) / 2)


def _with_prices(sample: Tensor, centres: Centres) -> Centres:
    distances = centres.offsets - sample @ centres.points.T
    scale = distances.std()
    price = torch.zeros(len(centres.offsets))
    for turn in range(PRICE_ROUNDS):
        sizes = torch.bincount((distances + price).argmin(dim=1), minlength=len(price)) / len(sample)
        price = price + scale * (sizes * len(price) - 1) * 0.5 / (1 + turn / 4)
    return Centres(centres.points, centres.offsets + price)


def labels_of(rows: Tensor, centres: Centres) -> Tensor:
    """int64 [n], the centre of each normalised row."""
    return torch.addmm(centres.offsets, rows, centres.points.T, alpha=-1).argmin(dim=1)


def pooled(rows: Tensor, labels: Tensor, count: int) -> Pools:
    """Exact sums of normalised rows [n, d] by their labels."""
    members = F.one_hot(labels, count).double()
    return Pools(members.T @ ((rows / STEP).round() * STEP).double(), members.sum(dim=0).long())


def add_chunk(pools: Pools, centres: Centres, chunk: Tensor, first_row: int) -> Pools:
    """The pools with a further chunk of the slide, features [n, d] as they are in the file."""
    labels = torch.empty(len(chunk), dtype=torch.int64)
    rows = block_rows(chunk.shape[1])
    map_blocks(chunk, first_row, lambda block: labels_of(normalised(block), centres), labels, rows)
    sums, counts = pools
    for start in range(0, len(chunk), rows):
        part = slice(start, start + rows)
        found = pooled(normalised(chunk[part]), labels[part], len(counts))
        sums, counts = sums + found.sums, counts + found.counts
    return Pools(sums, counts)


def empty_pools(count: int, feature_dim: int) -> Pools:
    return Pools(torch.zeros(count, feature_dim, dtype=torch.float64), torch.zeros(count, dtype=torch.int64))
