"""Does a device score and select right? Asked of the very device, before it serves."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fold import fold_scorer
from .launch_table import DTYPES, supports
from .op import ScoredTopK, gpu_vectors, score_topk
from .reference import ScorerWeights, select_topk

CHUNKS = (3000, 1001)
"""Rows of the two chunks of the slide that is asked about; the second is odd."""
PRODUCT_ERROR = 1e-6
"""Of a sum of products that fp32 accumulates, relative to the sum of their magnitudes."""
GELU_ERROR = 2e-6


class DeviceMismatch(RuntimeError):
    """A device gave other scores or kept other patches than it should."""


def check_device(weights: ScorerWeights, k: int, device: torch.device, chunks: tuple[int, int] = CHUNKS) -> None:
    """Scores a slide of two chunks twice for each dtype, with ties, NaN and infinities, and compares with the oracles.

    On CUDA this compiles what a server needs for slides of any length and this K.

    Args:
        weights: on the CPU.

    Raises:
        DeviceMismatch: a score is not as exact as the dtype allows, a kept patch is not one of the k best by the
            device's own scores, or a second run differs in a bit.
    """
    on_device = weights.to(device)
    for dtype in DTYPES:
        x = awkward_slide(sum(chunks), weights.feature_dim, dtype)
        found, again = (_in_chunks(x.to(device), on_device, k, chunks) for _ in range(2))
        for name, one, other in zip(ScoredTopK._fields, found, again, strict=True):
            if not torch.equal(_bits(one), _bits(other)):
                raise DeviceMismatch(f"{name} of {dtype}: found two runs that differ, wanted the same bits")
        scores = found.all_scores
        for name, one, wanted in zip(ScoredTopK._fields, found, select_topk(scores, k, x), strict=False):
            if not torch.equal(_bits(one), _bits(wanted)):
                raise DeviceMismatch(f"{name} of {dtype}: found others than the {k} best by the device's own scores")
        exact = exact_scores(x, weights, dtype if _rounds_weights(device, x, weights) else torch.float32)
        wrong = torch.isfinite(scores) != torch.isfinite(exact.scores)
        wrong |= torch.isfinite(scores) & ((scores - exact.scores).abs() > exact.tolerance)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise DeviceMismatch(
                f"scores of {dtype}: row {row}: found {float(scores[row]):.6g}, wanted {float(exact.scores[row]):.6g} "
                f"within {float(exact.tolerance[row]):.1g}"
            )


def check_vectors(weights: ScorerWeights, device: torch.device, n: int = sum(CHUNKS)) -> None:
    """The same of a scorer with R outputs: the vectors of a slide, twice for each dtype that a kernel takes.

    Args:
        weights: on the CPU, of `score_vectors`.
        n: rows of the slide.

    Raises:
        DeviceMismatch: as `check_device`.
    """
    on_device = weights.to(device)
    for dtype in DTYPES:
        x = awkward_slide(n, weights.feature_dim, dtype)
        found, again = (gpu_vectors(x.to(device), on_device) for _ in range(2))
        if found is None or again is None:  # PyTorch does it
            continue
        if not torch.equal(_bits(found), _bits(again)):
            raise DeviceMismatch(f"vectors of {dtype}: found two runs that differ, wanted the same bits")
        vectors, exact = found.cpu(), exact_scores(x, weights, dtype)
        wrong = torch.isfinite(vectors) != torch.isfinite(exact.scores)
        wrong |= torch.isfinite(vectors) & ((vectors - exact.scores).abs() > exact.tolerance)
        if bool(wrong.any()):
            row, r = wrong.nonzero()[0].tolist()
            raise DeviceMismatch(
                f"vectors of {dtype}: row {row}, number {r}: found {float(vectors[row, r]):.6g}, wanted "
                f"{float(exact.scores[row, r]):.6g} within {float(exact.tolerance[row, r]):.1g}"
            )


def awkward_slide(n: int, feature_dim: int, dtype: torch.dtype) -> Tensor:
    """Features [n, d] with many ties, and rows that hold NaN or infinities."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn((n + 2) // 3, feature_dim, generator=generator)
    x = few.repeat(3, 1)[torch.randperm(3 * len(few), generator=generator)[:n]].to(dtype)
    x[1::97, 0], x[2::89, -1] = float("nan"), float("inf")
    return x


class ExactScores(NamedTuple):
    scores: Tensor  # fp64 [n]; [n, R] of a scorer with R outputs
    tolerance: Tensor  # of the same shape: what sums in fp32 may differ by


def exact_scores(x: Tensor, weights: ScorerWeights, dtype: torch.dtype) -> ExactScores:
    """Scores in float64 of weights that are rounded to `dtype`."""
    folded = fold_scorer(weights, dtype)
    x, product = x.double(), folded.weight.double()
    mean = x.mean(dim=1, keepdim=True)
    rstd = 1 / (x.var(dim=1, keepdim=True, unbiased=False) + folded.eps).sqrt()
    if not folded.hidden_size:
        z = rstd * ((x - mean) @ product[:, None])
        magnitude = rstd * ((x.abs() + mean.abs()) @ product.abs()[:, None])
        scores, tolerance = z[:, 0], PRODUCT_ERROR * magnitude[:, 0]
    else:
        z = rstd * (x @ product - mean * folded.column_sum.double()) + folded.bias
        magnitude = rstd * (x.abs() @ product.abs() + mean.abs() * folded.column_sum.abs()) + folded.bias.abs()
        out = folded.out_weight.double()
        scores = F.linear(z * (1 + torch.erf(z / math.sqrt(2))) / 2, out)
        tolerance = F.linear(PRODUCT_ERROR * magnitude + GELU_ERROR, out.abs())
    scores = scores + folded.out_bias.double()
    return ExactScores(scores, tolerance + PRODUCT_ERROR * folded.out_bias.double().abs())


def _rounds_weights(device: torch.device, x: Tensor, weights: ScorerWeights) -> bool:
    """Whether the scores are a kernel's, which multiplies in X's dtype, and not PyTorch's, which multiplies in fp32."""
    return device.type == "cuda" and supports(x, weights)


def _in_chunks(x: Tensor, weights: ScorerWeights, k: int, chunks: tuple[int, int]) -> ScoredTopK:
    """On the CPU, with the scores of all rows."""
    first = score_topk(x[: chunks[0]], weights, k)
    last = score_topk(x[chunks[0] :], weights, k, first_row=chunks[0], running=first)
    last = last._replace(all_scores=torch.cat((first.all_scores, last.all_scores)))
    return ScoredTopK(*(one.cpu() for one in last))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
