"""Scoring and Hard Top-K in plain torch: the oracle of the kernels, and the CPU path."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .keys import ABSENT, pack_keys, unpack_keys

BLOCK_ROWS = 256
"""Rows of one matrix product. Blocks start at multiples of this row of the slide and the last one is padded,
so that a row's score has the same bits however the slide is cut into chunks. Small enough that a block's
temporaries stay on the heap: larger ones go back to the kernel and fault in again for every block."""


class ScorerWeights(NamedTuple):
    """Parameters of a per-patch scorer, fp32: LayerNorm(d), Linear(d, h), GELU, Linear(h, 1).

    Without a hidden layer (`hidden_weight` and `hidden_bias` None, h = 0) `out_weight` is [d]: LayerNorm, Linear(d, 1).
    """

    norm_weight: Tensor  # [d]
    norm_bias: Tensor  # [d]
    hidden_weight: Tensor | None  # [h, d]
    hidden_bias: Tensor | None  # [h]
    out_weight: Tensor  # [h], or [d] where h = 0
    out_bias: Tensor  # []
    norm_eps: float = 1e-5

    @property
    def feature_dim(self) -> int:
        return self.norm_weight.shape[0]

    def to(self, device: torch.device | str) -> ScorerWeights:
        return ScorerWeights(*(x.to(device) if isinstance(x, Tensor) else x for x in self))


class TopK(NamedTuple):
    """The kept patches of one slide, in ascending order of their rows."""

    indices: Tensor  # int64 [m], m <= k
    scores: Tensor  # fp32 [m]
    num_nonfinite: int  # patches that could not be kept because their score is NaN or infinite


def apply_scorer(features: Tensor, weights: ScorerWeights) -> Tensor:
    """Scores fp32 [n] of features [n, d] in one matrix product, computed in fp32."""
    x = F.layer_norm(features.float(), (weights.feature_dim,), weights.norm_weight, weights.norm_bias, weights.norm_eps)
    if weights.hidden_weight is not None:
        x = F.gelu(F.linear(x, weights.hidden_weight, weights.hidden_bias))
    return F.linear(x, weights.out_weight[None], weights.out_bias[None])[:, 0]


def score_patches(features: Tensor, weights: ScorerWeights, first_row: int = 0) -> Tensor:
    """Scores of consecutive rows of a slide, bitwise the same for every cut of the slide.

    Args:
        features: [n, d], any floating dtype; the row stride may exceed d.
        weights: on the device of `features`.
        first_row: row of `features[0]` within the slide.

    Returns:
        fp32 [n].
    """
    n, d = features.shape
    if d != weights.feature_dim:
        raise ValueError(f"features have size {d}, wanted {weights.feature_dim}")
    scores = torch.empty(n, dtype=torch.float32, device=features.device)
    start = 0
    while start < n:
        lead = (first_row + start) % BLOCK_ROWS
        stop = min(n, start + BLOCK_ROWS - lead)
        rows = features[start:stop]
        if stop - start < BLOCK_ROWS:
            block = rows.new_zeros((BLOCK_ROWS, d))
            block[lead : lead + stop - start] = rows
            scores[start:stop] = apply_scorer(block, weights)[lead : lead + stop - start]
        else:
            scores[start:stop] = apply_scorer(rows, weights)
        start = stop
    return scores


def score_topk(features: Tensor, weights: ScorerWeights, k: int) -> TopK:
    """Hard Top-K: the k best patches of a slide that lies in memory.

    Args:
        features: [N, d], any floating dtype.
        weights: on the device of `features`.
        k: patches to keep; fewer are kept where fewer have a finite score.
    """
    keys = pack_keys(score_patches(features, weights))
    return finish_topk(best_keys(keys, k), num_nonfinite=int((keys == ABSENT).sum()))


def best_keys(keys: Tensor, k: int) -> Tensor:
    """The min(k, n) largest of keys [n], in descending order."""
    return torch.topk(keys, min(k, keys.shape[0])).values


def finish_topk(best: Tensor, num_nonfinite: int) -> TopK:
    """Turns the best keys of a whole slide into its kept patches."""
    rows, scores = unpack_keys(best[best != ABSENT])
    order = torch.argsort(rows)
    return TopK(rows[order], scores[order], num_nonfinite)
