"""Soft Top-K: a differentiable mask whose sum is K, and which turns into the hard Top-K mask as tau falls to 0."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

REACH = 256.0
"""Scores further than this from the K-th one, in units of tau, count as this far: their alpha is 0 or 1 in fp32
either way, and exponentials of REACH stay within the range of fp64, as do the products of two of them."""


def soft_topk(scores: Tensor, k: Tensor | int, tau: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """LapSum Soft Top-K (arXiv 2503.06242): alpha in [0, 1] that sums to min(k, patches) in every row.

    alpha_i = F(s_i / tau - b) with F the CDF of the Laplace distribution and b the one threshold for which the sum
    is k, found in closed form after a sort. Equal scores have equal alpha, and a higher score never has a lower one.
    The gradient is exact and reaches the scores alone, not k and tau; it is differentiable once. With
    p_i = exp(-|s_i / tau - b|) / 2 it is

        d alpha_i / d s_j = p_i (delta_ij - p_j / sum(p)) / tau

    A row with no more than k patches has alpha = 1 on each of them and a zero gradient.

    Args:
        scores: [..., N], floating point, finite wherever the mask is true.
        k: at least 1; an int, or integers of shape [...], one for each row. May exceed N.
        tau: above 0; a float, or a tensor of shape [] or [...].
        mask: bool [..., N], true for a patch, false for padding. Padding may hold any value, NaN included: it does
            not count, and both its alpha and its gradient are exactly 0. None: no padding.

    Returns:
        [..., N], fp32 (fp64 for fp64 scores), under autocast too.

    Raises:
        ValueError: k below 1, tau not above 0, or a shape or dtype other than the above. Reading k and tau for this
            waits for the device where they are tensors on one.
    """
    rows = scores.shape[:-1]
    if scores.dim() == 0 or not scores.is_floating_point():
        raise ValueError(f"scores: found {scores.dtype} {list(scores.shape)}, wanted floating point [..., N]")
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    if mask.shape != scores.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask: found {mask.dtype} {list(mask.shape)}, wanted torch.bool {list(scores.shape)}")
    k = torch.as_tensor(k)
    if k.is_floating_point() or k.shape not in ((), rows):
        raise ValueError(f"k: found {k.dtype} {list(k.shape)}, wanted an int, or integers of shape {list(rows)}")
    if not bool((k >= 1).all()):
        raise ValueError(f"k: found {int(k.min())}, wanted at least 1")
    tau = torch.as_tensor(tau, dtype=torch.float64)
    if tau.shape not in ((), rows):
        raise ValueError(f"tau: found shape {list(tau.shape)}, wanted a float or shape {list(rows)}")
    if not bool((tau > 0).all()):
        raise ValueError(f"tau: found {float(tau.min())}, wanted above 0")
    k = k.to(scores.device, torch.int64).expand(rows)[..., None]
    tau = tau.to(scores.device).expand(rows)[..., None]
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return _LapSum.apply(scores, mask, k, tau) if scores.numel() else scores.clone()


class _LapSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor, k: Tensor, tau: Tensor) -> Tensor:
        alpha, density = _alpha_and_density(scores, mask, k, tau)
        ctx.save_for_backward(density, tau)
        return alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        density, tau = ctx.saved_tensors
        grad = grad.masked_fill(density == 0, 0)  # it may be inf there, as that of sqrt(alpha) is at alpha = 0
        total = density.sum(-1, keepdim=True).clamp_min(torch.finfo(density.dtype).tiny)
        mean = (density * grad).sum(-1, keepdim=True) / total
        return density * (grad - mean) / tau.to(density.dtype), None, None, None


def _alpha_and_density(scores: Tensor, mask: Tensor, k: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and p, both [..., N] in the scores' dtype and worked out in fp64; k and tau are [..., 1].

    Let u be the scores over tau, ascending, relative to the best one outside the Top-K. If c of the n patches lie
    below a threshold t, the sum of alpha at z = e^t is

        lower / (2 z) + (n - c) - upper z / 2,    lower = sum_{i < c} e^{u_i},    upper = sum_{i >= c} e^{-u_i}

    It falls as t rises. So the patches below b are those whose u, taken as the threshold, leaves the sum at k or more;
    with their number as c, e^b is the positive root of a quadratic in z. Where n <= k there is none of them: z = 0,
    alpha = 1 and p = 0. Padding stands at u = inf, where p = 0.
    """
    n = mask.sum(-1, keepdim=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    ascending, order = scores.masked_fill(~mask, torch.inf).sort(dim=-1)
    ascending = ascending.double()
    reference = ascending.gather(-1, (n - k - 1).clamp_min(0))
    u = ((ascending - reference) / tau).clamp(-REACH, REACH).masked_fill(rank >= n, torch.inf)
    exp_u = u.exp()
    lower = exp_u.cumsum(-1)
    upper = exp_u.reciprocal().flip(-1).cumsum(-1).flip(-1)
    total = (lower / exp_u - upper * exp_u) / 2 + (n - rank - 0.5)  # at t = u; NaN, hence not counted, at padding
    c = (total >= k).sum(-1, keepdim=True)
    lower = F.pad(lower, (1, 0)).gather(-1, c)
    upper = F.pad(upper, (0, 1)).gather(-1, c)
    surplus = (n - c - k).double()
    root = surplus.abs() + (surplus.square() + lower * upper).sqrt()  # of the two forms of z, the one that adds
    z = torch.where(surplus < 0, lower / root, root / upper)
    ratio = torch.empty_like(u).scatter_(-1, order, exp_u / z)
    density = torch.minimum(ratio, ratio.reciprocal()) / 2
    alpha = torch.where(ratio > 1, 1 - density, density)
    return alpha.masked_fill(~mask, 0).to(scores.dtype), density.to(scores.dtype)
