"""Exact Top-K over given score vectors on CUDA; how it works is told in `best.py`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .best import best_of_scores, merge_parts, slide_bounds
from .buffers import Workspace, check_last_row, make_buffers
from .launch_table import SELECT_BLOCK, SELECT_PARTS, SELECT_WARPS, top_k_sizes
from .reference import Running, Selected


# Many parameters: those of the oracle `reference.select_topk`, and three for tests.
def select_triton(
    scores: Tensor,
    k: int,
    features: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    first_row: int = 0,
    running: Running | Selected | None = None,
    by_score: bool = False,
    workspace: Workspace | None = None,
    num_parts: int | None = None,
    block: int = SELECT_BLOCK,
) -> Selected:
    """Keeps the k best of each slide.

    Args:
        scores: fp32 [N] of all slides, one after another.
        k: 1 .. 256.
        features: [N, d] of any strides, whose kept rows are gathered; None: they are not.
        cu_seqlens: int32 or int64 [S + 1], where each slide begins and ends; None: one slide.
        first_row: row of `scores[0]` within its slide, for a slide that arrives in chunks.
        running: what the slide's earlier chunks kept, by the same k.
        by_score: order by score instead of by row.
        workspace: scratch; None makes a new one.
        num_parts: programs for each slide, for tests.
        block: scores that a program takes at once, a power of two, for tests.
    """
    n, num_slides = scores.shape[0], 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_last_row(first_row, n)
    buffers = make_buffers(scores, num_slides, k, features, running, workspace)
    if num_slides == 0:
        return buffers.selected()
    parts = num_parts or max(1, min(SELECT_PARTS, triton.cdiv(n, block)))
    d, strides = (0, (0, 1)) if features is None else (features.shape[1], features.stride())
    _select_kernel[(parts, num_slides)](
        scores.contiguous(), cu_seqlens, n, first_row, k, int(by_score), features, *strides, *buffers,
        **top_k_sizes(k, d, block), num_warps=SELECT_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return buffers.selected()


# Many parameters: a Triton kernel takes each pointer and each size by itself.
@triton.jit(do_not_specialize=["n", "first_row", "k", "by_score"])
def _select_kernel(
    scores_ptr, cu_seqlens_ptr, n, first_row, k, by_score, features_ptr, features_stride, column_stride,
    running_keys_ptr, running_rows_ptr, running_indices_ptr,
    workspace_ptr, tickets_ptr, indices_ptr, values_ptr, rows_ptr, keys_ptr,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    part, parts, slide = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    begin, length = slide_bounds(cu_seqlens_ptr, slide, n)
    per_part = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    end = tl.minimum((part + 1) * per_part, length)
    best = best_of_scores(scores_ptr + begin, part * per_part, end, first_row, K_PAD, BLOCK)
    merge_parts(
        best, part, parts, slide, begin, first_row, k, by_score, features_ptr, features_stride, column_stride,
        running_keys_ptr, running_rows_ptr, running_indices_ptr,
        workspace_ptr, tickets_ptr, indices_ptr, values_ptr, rows_ptr, keys_ptr, K_PAD, BLOCK, D, BLOCK_D, LOOKUP,
    )  # fmt: skip
