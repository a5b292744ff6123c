"""A scorer's parameters as the kernels take them: LayerNorm's gain and shift folded into the layer behind it."""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import ScorerWeights


class FoldedScorer(NamedTuple):
    """A scorer's parameters as the kernels take them, on the device."""

    weight: Tensor  # [d, h_pad] in X's dtype; [d] fp32 where h = 0
    column_sum: Tensor  # fp32 [h_pad], of the rounded weight; [1] where h = 0
    bias: Tensor  # fp32 [h_pad]
    out_weight: Tensor  # fp32 [h_pad]; [R, h_pad] of a scorer with R outputs
    out_bias: Tensor  # fp32 [1]; [R]
    eps: float
    hidden_size: int  # h, 0 for the linear scorer

    def pointers(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of `tile.score_tile`."""
        return self.weight, self.column_sum, self.bias, self.out_weight, self.out_bias

    @property
    def padded_hidden_size(self) -> int:
        """h_pad, or 0 for the linear scorer."""
        return self.weight.shape[1] if self.hidden_size else 0


def fold_scorer(weights: ScorerWeights, dtype: torch.dtype) -> FoldedScorer:
    """Folds LayerNorm's gain and shift into the layer behind it, in float64, and rounds once."""
    gain, shift = weights.norm_weight.double(), weights.norm_bias.double()
    if weights.hidden_weight is None or weights.hidden_bias is None:
        weight = gain * weights.out_weight.double()
        bias = weights.out_bias.double() + shift @ weights.out_weight.double()
        rounded = weight.float()
        total, one = rounded.double().sum()[None].float(), rounded.new_ones(1)
        return FoldedScorer(rounded, total, 0 * one, one, bias[None].float(), weights.norm_eps, 0)
    h, d = weights.hidden_weight.shape
    pad = max(16, 1 << (h - 1).bit_length())
    hidden = weights.hidden_weight.double() * gain
    weight = torch.zeros(d, pad, dtype=dtype, device=hidden.device)
    weight[:, :h] = (hidden - hidden.mean(dim=1, keepdim=True)).T.to(dtype)
    bias = torch.zeros(pad, dtype=torch.float32, device=hidden.device)
    bias[:h] = weights.hidden_bias.double() + weights.hidden_weight.double() @ shift
    out = bias.new_zeros(*weights.out_weight.shape[:-1], pad)
    out[..., :h] = weights.out_weight
    column_sum = weight.double().sum(dim=0).float()
    return FoldedScorer(weight, column_sum, bias, out, weights.out_bias.reshape(-1).float(), weights.norm_eps, h)


class _CachedFold(NamedTuple):
    tensors: tuple[weakref.ref, ...]  # what it was folded from
    versions: tuple[int, ...]
    folded: FoldedScorer


_folds: dict[tuple, _CachedFold] = {}
_fold_lock = threading.Lock()


def fold_cached(weights: ScorerWeights, dtype: torch.dtype) -> FoldedScorer:
    """`fold_scorer`, once for each state of the weights: every tensor is recognised by object and version.

    Tensors made in inference mode have no version: they must not change.
    """
    tensors = [x for x in weights if isinstance(x, Tensor)]
    versions = tuple(0 if x.is_inference() else x._version for x in tensors)
    key = (*map(id, tensors), weights.norm_eps, dtype)
    with _fold_lock:
        found = _folds.get(key)
        same = found is not None and all(ref() is x for ref, x in zip(found.tensors, tensors, strict=True))
        if found is not None and same and found.versions == versions:
            return found.folded
        for stale in [key for key, fold in _folds.items() if any(ref() is None for ref in fold.tensors)]:
            del _folds[stale]
        folded = fold_scorer(weights, dtype)
        if folded.weight.is_cuda:  # other streams will use it without waiting for this one
            torch.cuda.current_stream(folded.weight.device).synchronize()
        _folds[key] = _CachedFold(tuple(map(weakref.ref, tensors)), versions, folded)
        return folded
