"""Vectors of patches on CUDA: R numbers each, for a scorer that hears the question. `out_weight` is [R, h], not [h]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fold import fold_cached
from .launch_table import LaunchConfig, card_of, precision, score_config
from .reference import ScorerWeights
from .tile import hidden_tile


def vectors_triton(features: Tensor, weights: ScorerWeights, config: LaunchConfig | None = None) -> Tensor:
    """phi of every row in one launch; the torch oracle is `reference.score_vectors`.

    A row's numbers have the same bits alone and in a batch, and each those that `score_triton` gives a scorer with that
    one output.

    Args:
        features: [N, d] that `launch_table.supports` takes.
        weights: on the device of `features`, with a hidden layer; `out_weight` [R, h] and `out_bias` [R].
        config: another launch configuration, for tests and benchmarks.

    Returns:
        fp32 [N, R].

    Raises:
        ValueError: features of another d than the weights', or weights without a hidden layer.
    """
    n, d = features.shape
    if d != weights.feature_dim or not weights.hidden_size:
        found = f"features have size {d} and the scorer h = {weights.hidden_size}"
        raise ValueError(f"{found}, wanted {weights.feature_dim} and a hidden layer")
    folded, rank = fold_cached(weights, features.dtype), len(weights.out_weight)
    vectors = torch.empty(n, rank, dtype=torch.float32, device=features.device)
    if n == 0:
        return vectors
    config = config or score_config(card_of(features.device).arch, d, folded.hidden_size, features.dtype)
    _vectors_kernel[(triton.cdiv(n, config.block_m),)](
        features, features.stride(0), *folded.pointers(), folded.eps, vectors, n,
        D=d, H=folded.padded_hidden_size, R=rank, BLOCK_M=config.block_m, BLOCK_K=config.block_k,
        PRECISION=precision(features.dtype, folded.hidden_size), **config.options(),
    )  # fmt: skip
    return vectors


# Many parameters: a Triton kernel takes each pointer and each size by itself.
@triton.jit(do_not_specialize=["n"])
def _vectors_kernel(
    x_ptr, x_stride, weight_ptr, column_sum_ptr, bias_ptr, out_weight_ptr, out_bias_ptr, eps, vectors_ptr, n,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows behind the end repeat the last one: unpredicated loads, and their vectors are not stored.
    x_row = x_ptr + tl.minimum(row, n - 1).to(tl.int64) * x_stride
    hidden = tl.arange(0, H)
    z = hidden_tile(x_row, weight_ptr, column_sum_ptr, bias_ptr, eps, D, H, BLOCK_M, BLOCK_K, PRECISION)
    for r in range(R):
        weight = tl.load(out_weight_ptr + r * H + hidden)
        number = tl.sum(z * weight[None, :], axis=1) + tl.load(out_bias_ptr + r)
        tl.store(vectors_ptr + row.to(tl.int64) * R + r, number, mask=row < n)
