"""Scoring and Hard Top-K in plain torch: the oracle of the kernels, and the CPU path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import block_rows, map_blocks
from .keys import ABSENT, pack_keys, unpack_keys

MAX_MAGNITUDE = 2.0**50
"""By `ScorerWeights` a patch scores NaN, on every device, unless its features' mean and deviation lie below this.

NaN and infinite features have no finite mean. Larger features are no embedding, and whether their squares overflow fp32
would depend on the order of sums. Below it nothing overflows up to d = 2560. fp16 never reaches it.
"""


class ScorerWeights(NamedTuple):
    """Parameters of a per-patch scorer, fp32: LayerNorm(d), Linear(d, h), GELU, Linear(h, 1).

    Without a hidden layer (`hidden_weight` and `hidden_bias` None, h = 0) `out_weight` is [d]: LayerNorm, Linear(d, 1).
    Of a scorer with R outputs (`score_vectors`) `out_weight` is [R, h] and `out_bias` [R].
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

    @property
    def hidden_size(self) -> int:
        """h; 0 without a hidden layer."""
        return 0 if self.hidden_weight is None else self.hidden_weight.shape[0]

    def tensors(self) -> list[Tensor]:
        """All but `norm_eps`; `of_tensors` makes the same scorer of them."""
        hidden = [one for one in (self.hidden_weight, self.hidden_bias) if one is not None]
        return [self.norm_weight, self.norm_bias, self.out_weight, self.out_bias, *hidden]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], norm_eps: float) -> ScorerWeights:
        norm_weight, norm_bias, out_weight, out_bias, *hidden = tensors
        hidden_weight, hidden_bias = hidden if hidden else (None, None)
        return cls(norm_weight, norm_bias, hidden_weight, hidden_bias, out_weight, out_bias, norm_eps)

    def map(self, function: Callable[[Tensor], Tensor]) -> ScorerWeights:
        """The scorer of the function's values of all tensors."""
        return self.of_tensors([function(one) for one in self.tensors()], self.norm_eps)

    def to(self, device: torch.device | str) -> ScorerWeights:
        return self.map(lambda one: one.to(device))


class Running(NamedTuple):
    """What the earlier chunks of S slides kept; of one slide, without the first axis."""

    indices: Tensor  # int64 [S, k]
    rows: Tensor | None  # [S, k, d]
    keys: Tensor  # int64 [S, k_pad]


class Selected(NamedTuple):
    """The kept patches of S slides. Places without a patch hold index -1, score -inf and a row of zeros."""

    indices: Tensor  # int64 [S, k], rows within their slide
    scores: Tensor  # fp32 [S, k]
    rows: Tensor | None  # [S, k, d], the features' dtype
    keys: Tensor  # int64 [S, k_pad]: the running Top-K, for the next chunk of a streamed slide


def apply_scorer(features: Tensor, weights: ScorerWeights) -> Tensor:
    """Scores fp32 [n] of features [n, d] in one matrix product, computed in fp32; NaN by `MAX_MAGNITUDE`."""
    single = weights._replace(out_weight=weights.out_weight[None], out_bias=weights.out_bias[None])
    return score_vectors(features, single)[:, 0]


def score_vectors(features: Tensor, weights: ScorerWeights) -> Tensor:
    """The same of a scorer with R outputs, `out_weight` [R, h] and `out_bias` [R]: fp32 [n, R]."""
    gain, shift = weights.norm_weight, weights.norm_bias
    x, mean, rstd = torch.native_layer_norm(features.float(), [weights.feature_dim], gain, shift, weights.norm_eps)
    if weights.hidden_weight is not None:
        x = F.gelu(F.linear(x, weights.hidden_weight, weights.hidden_bias))
    scores = F.linear(x, weights.out_weight, weights.out_bias)
    valid = (mean.abs() < MAX_MAGNITUDE) & (rstd > 1 / MAX_MAGNITUDE)
    return torch.where(valid, scores, torch.nan)


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
    width = d if weights.hidden_weight is None else max(d, len(weights.hidden_weight))
    map_blocks(features, first_row, partial(apply_scorer, weights=weights), scores, block_rows(width))
    return scores


K_BUCKETS = (32, 256)
"""The sizes of Top-K that are compiled: k is rounded up to one of them, and is a number at run time."""
MAX_FAST_K = K_BUCKETS[-1]
"""The largest k that the kernels keep; beyond it PyTorch selects."""


def padded_k(k: int) -> int:
    """The size of a running Top-K: of `K_BUCKETS`, or k itself where it is larger."""
    if k < 1:
        raise ValueError(f"k: found {k}, wanted at least 1")
    return next((size for size in K_BUCKETS if k <= size), k)


def select_topk(
    scores: Tensor,
    k: int,
    features: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    first_row: int = 0,
    running: Running | Selected | None = None,
    by_score: bool = False,
) -> Selected:
    """Keeps the k best of each slide: the oracle of `select.select_triton`, with the same arguments."""
    k_pad = padded_k(k)
    bounds = [0, scores.shape[0]] if cu_seqlens is None else cu_seqlens.tolist()
    slides = []
    for slide, (begin, end) in enumerate(pairwise(bounds)):
        before = None
        if running is not None:
            rows = None if running.rows is None else running.rows[slide]
            before = Running(running.indices[slide], rows, running.keys[slide])
        part = None if features is None else features[begin:end]
        slides.append(_select_slide(scores[begin:end], k, k_pad, part, first_row, before, by_score))
    if not slides:
        shapes = _select_slide(scores, k, k_pad, features, first_row, None, by_score)
        return Selected(*(None if x is None else x.new_empty((0, *x.shape)) for x in shapes))
    return Selected(*(None if column[0] is None else torch.stack(column) for column in zip(*slides, strict=True)))


def _select_slide(
    scores: Tensor, k: int, k_pad: int, features: Tensor | None, first_row: int, before: Running | None, by_score: bool
) -> Selected:
    keys = pack_keys(scores, first_row)
    if before is not None:
        keys = torch.cat((before.keys, keys))
    best = torch.topk(keys, min(k, keys.shape[0])).values
    best = best[best != ABSENT]
    rows, values = unpack_keys(best)
    order = torch.arange(len(rows), device=rows.device) if by_score else torch.argsort(rows)
    rows, values = rows[order], values[order]
    m = len(rows)
    indices = torch.full((k,), -1, device=rows.device)
    padded = values.new_full((k,), float("-inf"))
    all_keys = keys.new_full((k_pad,), ABSENT)
    indices[:m], padded[:m], all_keys[:m] = rows, values, best
    kept = None
    if features is not None:
        kept = features.new_zeros((k, features.shape[1]))
        new = rows >= first_row
        kept[:m][new] = features[rows[new] - first_row]
        if before is not None and before.rows is not None:
            place = (before.indices[None, :] == rows[~new][:, None]).int().argmax(dim=1)
            kept[:m][~new] = before.rows[place]
    return Selected(indices, padded, kept, all_keys)
