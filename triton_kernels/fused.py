"""Scores a slide and keeps its best k in one launch on CUDA.

Each program scores a run of tiles, reads its scores back and keeps the best of them; the last program of a slide
merges, orders and gathers (`best.py`). There are about as many programs as the GPU runs at once, so that W stays in a
cache and every program has the same work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .best import best_of_scores, merge_parts, slide_bounds
from .buffers import MAX_PARTS, Workspace, check_last_row, make_buffers
from .fold import fold_cached
from .launch_table import FusedConfig, precision, top_k_sizes
from .reference import Running, ScorerWeights, Selected
from .tile import score_tile


# Many parameters: those of `op.score_topk`, and three for tests.
def score_topk_triton(
    features: Tensor,
    weights: ScorerWeights,
    k: int,
    config: FusedConfig,
    cu_seqlens: Tensor | None = None,
    first_row: int = 0,
    running: Running | None = None,
    by_score: bool = False,
    workspace: Workspace | None = None,
) -> tuple[Selected, Tensor]:
    """Scores every row and keeps the k best of each slide.

    Args:
        features: [N, d] that `launch_table.supports` takes.
        weights: on the device of `features`.
        k: 1 .. 256.
        config: of `launch_table.fused_config`, or another one for tests and benchmarks.
        cu_seqlens: int32 or int64 [S + 1], where each slide begins and ends; None: one slide.
        first_row: row of `features[0]` within its slide, for a slide that arrives in chunks.
        running: what the slide's earlier chunks kept, by the same k.
        by_score: order by score instead of by row.
        workspace: scratch; None makes a new one.

    Returns:
        The kept patches, and the scores of all rows, fp32 [N].
    """
    n, d = features.shape
    num_slides = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if d != weights.feature_dim:
        raise ValueError(f"features have size {d}, wanted {weights.feature_dim}")
    check_last_row(first_row, n)
    folded = fold_cached(weights, features.dtype)
    scores = torch.empty(n, dtype=torch.float32, device=features.device)
    buffers = make_buffers(features, num_slides, k, features, running, workspace)
    if num_slides == 0:
        return buffers.selected(), scores
    parts = max(1, min(triton.cdiv(n, config.tile.block_m), config.programs, MAX_PARTS))
    tile, h = config.tile, folded.hidden_size
    _score_topk_kernel[(parts, num_slides)](
        features, features.stride(0), *folded.pointers(), folded.eps, scores, cu_seqlens, n, first_row, k,
        int(by_score), *buffers, H=folded.padded_hidden_size, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k,
        PRECISION=precision(features.dtype, h), **top_k_sizes(k, d, config.block, h), **tile.options(),
    )  # fmt: skip
    return buffers.selected(), scores


# Many parameters: a Triton kernel takes each pointer and each size by itself.
@triton.jit(do_not_specialize=["n", "first_row", "k", "by_score"])
def _score_topk_kernel(
    x_ptr, x_stride, weight_ptr, column_sum_ptr, bias_ptr, out_weight_ptr, out_bias_ptr, eps, scores_ptr,
    cu_seqlens_ptr, n, first_row, k, by_score, running_keys_ptr, running_rows_ptr, running_indices_ptr,
    workspace_ptr, tickets_ptr, indices_ptr, values_ptr, rows_ptr, keys_ptr,
    D: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    part, parts, slide = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    begin, length = slide_bounds(cu_seqlens_ptr, slide, n)
    per_part = tl.cdiv(tl.cdiv(length, BLOCK_M), parts) * BLOCK_M
    first, end = part * per_part, tl.minimum((part + 1) * per_part, length)
    for start in range(first, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        # Rows behind the end repeat the last one: unpredicated loads, and their scores are not stored.
        x_row = x_ptr + (begin + tl.minimum(row, length - 1)) * x_stride
        score = score_tile(
            x_row, weight_ptr, column_sum_ptr, bias_ptr, out_weight_ptr, out_bias_ptr, eps,
            D, H, BLOCK_M, BLOCK_K, PRECISION,
        )  # fmt: skip
        tl.store(scores_ptr + begin + row, score, mask=row < length)
    tl.debug_barrier()  # the scores below were stored by other threads of this program
    best = best_of_scores(scores_ptr + begin, first, end, first_row, K_PAD, BLOCK)
    merge_parts(
        best, part, parts, slide, begin, first_row, k, by_score, x_ptr, x_stride, 1,
        running_keys_ptr, running_rows_ptr, running_indices_ptr,
        workspace_ptr, tickets_ptr, indices_ptr, values_ptr, rows_ptr, keys_ptr, K_PAD, BLOCK, D, BLOCK_D, LOOKUP,
    )  # fmt: skip
