"""Scores of patches in one pass over X: LayerNorm folded into the product, GELU, dot. CUDA.

z = rstd * (x @ W - mean * colsum) + bias, score = gelu(z) @ v + b, with W = diag(gamma) W1^T, each of its columns
centred (a LayerNorm takes the mean away, so a column's mean adds nothing), rounded to X's dtype. X is read once, as it
is; its mean and variance are summed from the same tiles that feed the tensor cores. Rows are independent: a row's score
has the same bits alone and in a batch, at any place in X.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import MAX_MAGNITUDE, ScorerWeights

MIN_DIM, MAX_DIM, DIM_STEP = 256, 2560, 64
MAX_HIDDEN = 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Phi(x) - 1/2 = x * p(2 x^2 / 5.2^2 - 1) on |x| <= 5.2: minimax in the GELU's error, fitted in float64 by iteratively
# reweighted least squares on 4,000 Chebyshev nodes. GELU is exact to 1.3e-6 in fp32 (torch's erf form: 1.2e-6).
GELU_REACH = tl.constexpr(5.2)
LIMIT = tl.constexpr(MAX_MAGNITUDE)


class FoldedScorer(NamedTuple):
    """A scorer's parameters as the kernels take them, on the device."""

    weight: Tensor  # [d, h_pad] in X's dtype; [d] fp32 where h = 0
    column_sum: Tensor  # fp32 [h_pad], of the rounded weight; [1] where h = 0
    bias: Tensor  # fp32 [h_pad]
    out_weight: Tensor  # fp32 [h_pad]
    out_bias: Tensor  # fp32 [1]
    eps: float
    hidden_size: int  # h, 0 for the linear scorer


class ScoreConfig(NamedTuple):
    """Launch configuration; BLOCK_K never depends on N, because it decides the order of sums."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


def supports(features: Tensor, weights: ScorerWeights) -> bool:
    """Whether the kernels take this input. For any other input the reference is used."""
    d = features.shape[1]
    h = 0 if weights.hidden_weight is None else weights.hidden_weight.shape[0]
    return (
        features.dtype in DTYPES
        and features.stride(1) == 1
        and MIN_DIM <= d <= MAX_DIM
        and d % DIM_STEP == 0
        and h <= MAX_HIDDEN
    )


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
    pad = max(16, triton.next_power_of_2(h))
    hidden = weights.hidden_weight.double() * gain
    weight = torch.zeros(d, pad, dtype=dtype, device=hidden.device)
    weight[:, :h] = (hidden - hidden.mean(dim=1, keepdim=True)).T.to(dtype)
    bias = torch.zeros(pad, dtype=torch.float32, device=hidden.device)
    bias[:h] = weights.hidden_bias.double() + weights.hidden_weight.double() @ shift
    out = torch.zeros_like(bias)
    out[:h] = weights.out_weight
    column_sum = weight.double().sum(dim=0).float()
    return FoldedScorer(weight, column_sum, bias, out, weights.out_bias[None].float(), weights.norm_eps, h)


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


def score_config(arch: int, feature_dim: int, hidden_size: int, dtype: torch.dtype) -> ScoreConfig:
    """The configuration from a static table by (architecture, d, h). It does not depend on N, because that would change
    the bits of a slide's scores.

    Args:
        arch: 80, 86, 89, 90, 100, 120 and the like.
    """
    if hidden_size == 0:
        block_k = next(size for size in (256, 128, 64) if feature_dim % size == 0)
        return ScoreConfig(16, block_k, 4, 1)
    if dtype == torch.float32:  # exact fp32 products run on the CUDA cores: small tiles
        return ScoreConfig(32 if hidden_size > 256 else 64, 32, 8, 2)
    # Chosen by compiling ahead of time: the largest tiles that spill no register (tests/kernels/test_compile.py).
    small_shared_memory = arch in (86, 89) or arch >= 120
    if hidden_size > 256:
        return ScoreConfig(64, 32, 8, 2) if small_shared_memory else ScoreConfig(64, 64, 8 if arch < 90 else 16, 2)
    if hidden_size > 128:
        if small_shared_memory:
            return ScoreConfig(64, 64, 8, 2)
        return ScoreConfig(128, 32, 8, 3) if arch < 90 else ScoreConfig(128 if arch < 100 else 64, 64, 8, 3)
    if small_shared_memory or arch < 90:
        return ScoreConfig(128, 64, 8, 2)
    return ScoreConfig(256 if arch < 100 or hidden_size <= 64 else 128, 64, 8, 3)


def score_triton(features: Tensor, weights: ScorerWeights, config: ScoreConfig | None = None) -> Tensor:
    """Scores every row; the torch oracle is `reference.score_patches`.

    Args:
        features: [N, d] that `supports` takes.
        weights: on the device of `features`.
        config: another launch configuration, for tests and benchmarks.

    Returns:
        fp32 [N].

    Raises:
        ValueError: features of another d than the weights'.
    """
    n, d = features.shape
    if d != weights.feature_dim:
        raise ValueError(f"features have size {d}, wanted {weights.feature_dim}")
    folded = fold_cached(weights, features.dtype)
    scores = torch.empty(n, dtype=torch.float32, device=features.device)
    if n == 0:
        return scores
    if config is None:
        major, minor = torch.cuda.get_device_capability(features.device)
        config = score_config(10 * major + minor, d, folded.hidden_size, features.dtype)
    grid = (triton.cdiv(n, config.block_m),)
    # Fused multiply-adds are asked for by name: Triton 3.10 turns them off by default, which would change bits.
    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if folded.hidden_size == 0:
        _score_linear_kernel[grid](
            features, features.stride(0), folded.weight, folded.column_sum, folded.out_bias, scores,
            n, folded.eps, D=d, BLOCK_M=config.block_m, BLOCK_K=config.block_k, **launch,
        )  # fmt: skip
    else:
        _score_kernel[grid](
            features, features.stride(0), folded.weight, folded.column_sum, folded.bias, folded.out_weight,
            folded.out_bias, scores, n, folded.eps,
            D=d, H=folded.weight.shape[1], BLOCK_M=config.block_m, BLOCK_K=config.block_k, **launch,
        )  # fmt: skip
    return scores


@triton.jit
def _gelu(x):
    """x * Phi(x), exact to 1.3e-6 in fp32, without a special-function unit."""
    t = tl.minimum(tl.maximum(x, -GELU_REACH), GELU_REACH)
    u = t * t * (2.0 / (GELU_REACH * GELU_REACH)) - 1.0
    p = 0.000858755712
    p = p * u - 0.00250370163
    p = p * u + 0.00285363463
    p = p * u - 0.00350575166
    p = p * u + 0.00755781318
    p = p * u - 0.013103312
    p = p * u + 0.0183871696
    p = p * u - 0.0245934174
    p = p * u + 0.0319072625
    p = p * u - 0.0399412986
    p = p * u + 0.0500301676
    p = p * u - 0.0677434024
    p = p * u + 0.135949932
    phi = 0.5 + t * p
    phi = tl.where(x >= GELU_REACH, 1.0, tl.where(x <= -GELU_REACH, 0.0, phi))
    return x * phi


@triton.jit
def _add_statistics(x, shift, total, squares, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Adds a tile's sums of (x - shift) and its squares; groups of 8 columns stay inside a thread."""
    centred = tl.reshape(x.to(tl.float32) - shift[:, None], (BLOCK_M, BLOCK_K // 8, 8))
    return total + tl.sum(centred, axis=2), squares + tl.sum(centred * centred, axis=2)


@triton.jit
def _rstd(mean, variance, eps):
    """1 / sqrt(variance + eps), or NaN by the rule of `reference.MAX_MAGNITUDE`: a NaN here reaches the score."""
    valid = (tl.abs(mean) < LIMIT) & (variance < LIMIT * LIMIT)
    return tl.where(valid, 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps), float("nan"))


@triton.jit
def _score_kernel(
    x_ptr, x_stride, weight_ptr, column_sum_ptr, bias_ptr, out_weight_ptr, out_bias_ptr, scores_ptr,
    n, eps,
    D: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows behind the end repeat the last one: unpredicated loads, and their scores are not stored.
    x_row = x_ptr + tl.minimum(row, n - 1).to(tl.int64) * x_stride
    column = tl.arange(0, BLOCK_K)
    hidden = tl.arange(0, H)
    # The variance is taken about the first columns' mean: without it a large common offset would cancel badly.
    shift = tl.sum(tl.load(x_row[:, None] + column[None, :]).to(tl.float32), axis=1) / BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_K // 8), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K // 8), tl.float32)
    product = tl.zeros((BLOCK_M, H), tl.float32)
    for k in range(0, D, BLOCK_K):
        x = tl.load(x_row[:, None] + (k + column)[None, :])
        weight = tl.load(weight_ptr + (k + column)[:, None] * H + hidden[None, :])
        product = tl.dot(x, weight, product, input_precision="ieee")
        total, squares = _add_statistics(x, shift, total, squares, BLOCK_M, BLOCK_K)
    offset = tl.sum(total, axis=1) / D
    variance = tl.sum(squares, axis=1) / D - offset * offset
    mean = shift + offset
    rstd = _rstd(mean, variance, eps)
    z = rstd[:, None] * (product - mean[:, None] * tl.load(column_sum_ptr + hidden)[None, :])
    z = _gelu(z + tl.load(bias_ptr + hidden)[None, :])
    score = tl.sum(z * tl.load(out_weight_ptr + hidden)[None, :], axis=1) + tl.load(out_bias_ptr)
    tl.store(scores_ptr + row, score, mask=row < n)


@triton.jit
def _score_linear_kernel(
    x_ptr, x_stride, weight_ptr, weight_sum_ptr, bias_ptr, scores_ptr,
    n, eps,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = x_ptr + tl.minimum(row, n - 1).to(tl.int64) * x_stride
    column = tl.arange(0, BLOCK_K)
    shift = tl.sum(tl.load(x_row[:, None] + column[None, :]).to(tl.float32), axis=1) / BLOCK_K
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in range(0, D, BLOCK_K):
        x = tl.load(x_row[:, None] + (k + column)[None, :]).to(tl.float32) - shift[:, None]
        total += x
        squares += x * x
        product += x * tl.load(weight_ptr + k + column)[None, :]
    offset = tl.sum(total, axis=1) / D
    variance = tl.sum(squares, axis=1) / D - offset * offset
    rstd = _rstd(shift + offset, variance, eps)
    score = rstd * (tl.sum(product, axis=1) - offset * tl.load(weight_sum_ptr)) + tl.load(bias_ptr)
    tl.store(scores_ptr + row, score, mask=row < n)
