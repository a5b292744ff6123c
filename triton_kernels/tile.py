"""Device code: the scores of a tile of rows, in one pass over X. LayerNorm is folded into the product.

z = rstd * (x @ W - mean * colsum) + bias, score = gelu(z) @ v + b, with W = diag(gamma) W1^T, each of its columns
centred (a LayerNorm takes the mean away, so a column's mean adds nothing), rounded to X's dtype. X is read once, as it
is; its mean and variance are summed from the same tiles that feed the tensor cores. Rows are independent: a row's score
has the same bits alone and in a batch, at any place in X, and in every kernel that calls `score_tile`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference import MAX_MAGNITUDE

# Phi(x) - 1/2 = x * p(2 x^2 / 5.2^2 - 1) on |x| <= 5.2: minimax in the GELU's error, fitted in float64 by iteratively
# reweighted least squares on 4,000 Chebyshev nodes. GELU is exact to 1.3e-6 in fp32 (torch's erf form: 1.2e-6).
GELU_REACH = tl.constexpr(5.2)
LIMIT = tl.constexpr(MAX_MAGNITUDE)


# Many parameters: a Triton function takes each pointer and each size by itself.
@triton.jit
def score_tile(
    x_row, weight_ptr, column_sum_ptr, bias_ptr, out_weight_ptr, out_bias_ptr, eps,
    D: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores fp32 [BLOCK_M] of the rows at x_row [BLOCK_M]; H = 0: the scorer without a hidden layer."""
    if H == 0:
        score = _linear_tile(x_row, weight_ptr, column_sum_ptr, out_bias_ptr, eps, D, BLOCK_M, BLOCK_K)
    else:
        z = hidden_tile(x_row, weight_ptr, column_sum_ptr, bias_ptr, eps, D, H, BLOCK_M, BLOCK_K, PRECISION)
        score = tl.sum(z * tl.load(out_weight_ptr + tl.arange(0, H))[None, :], axis=1) + tl.load(out_bias_ptr)
    return score


# Many parameters: as `score_tile`.
@triton.jit
def hidden_tile(
    x_row, weight_ptr, column_sum_ptr, bias_ptr, eps,
    D: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the hidden layer makes of the rows at x_row, behind its GELU: fp32 [BLOCK_M, H]."""
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
        product = tl.dot(x, weight, product, input_precision=PRECISION)
        total, squares = _add_statistics(x, shift, total, squares, BLOCK_M, BLOCK_K)
    offset = tl.sum(total, axis=1) / D
    variance = tl.sum(squares, axis=1) / D - offset * offset
    mean = shift + offset
    rstd = _rstd(mean, variance, eps)
    z = rstd[:, None] * (product - mean[:, None] * tl.load(column_sum_ptr + hidden)[None, :])
    return _gelu(z + tl.load(bias_ptr + hidden)[None, :])


# Many parameters: as `score_tile`.
@triton.jit
def _linear_tile(
    x_row, weight_ptr, weight_sum_ptr, bias_ptr, eps, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
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
    return rstd * (tl.sum(product, axis=1) - offset * tl.load(weight_sum_ptr)) + tl.load(bias_ptr)


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
