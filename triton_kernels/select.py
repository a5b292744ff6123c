"""Exact Top-K over score vectors on CUDA, by unique keys and bitonic networks. No buffer can overflow.

Each program keeps the best of its part of a slide. An atomic counter tells the last program to finish; it merges all
parts, orders what is kept and gathers its rows. Keys are unique (`keys.py`), so the result depends on nothing but the
scores: not on the number of programs, not on who finishes last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Running, Selected, padded_k

MAX_K = 256
BLOCK = 1024
MAX_PARTS = 128
SELECT_WARPS = 8
GATHER_BLOCK = 64
"""Columns of the kept rows that are copied at once."""
LOOKUP_BLOCK = 16
"""Earlier rows that all kept ones are compared with at once."""
_ABSENT = tl.constexpr(-(2**63))


class Workspace:
    """Scratch of one stream; may be reused by any later call of the same or smaller size, also in a CUDA graph."""

    def __init__(self, device: torch.device | str, num_slides: int = 1) -> None:
        self.keys = torch.empty(num_slides * MAX_PARTS * MAX_K, dtype=torch.int64, device=device)
        self.tickets = torch.zeros(num_slides, dtype=torch.int32, device=device)


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def stream_workspace(device: torch.device, num_slides: int) -> Workspace:
    """The current stream's own workspace, made once: calls of one stream run one after another.

    A CUDA graph under capture gets one of its own, which lives in the graph's memory as long as the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return Workspace(device, num_slides)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    found = _workspaces.get(key)
    if found is None or len(found.tickets) < num_slides:
        found = _workspaces[key] = Workspace(device, num_slides)
    return found


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
    block: int = BLOCK,
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
        num_parts: programs for each slide, at most `MAX_PARTS`, for tests.
        block: scores that a program takes at once, a power of two of at least k, for tests.
    """
    num_slides = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n, device, k_pad = scores.shape[0], scores.device, padded_k(k)
    if k > MAX_K:
        raise ValueError(f"k: found {k}, wanted at most {MAX_K}")
    if first_row + n - 1 > 2**31 - 1:
        raise ValueError(f"row {first_row + n - 1} does not fit a key, wanted at most {2**31 - 1}")
    workspace = workspace or Workspace(device, num_slides)
    parts = num_parts or max(1, min(MAX_PARTS, triton.cdiv(n, block)))
    indices = torch.empty((num_slides, k), dtype=torch.int64, device=device)
    values = torch.empty((num_slides, k), dtype=torch.float32, device=device)
    keys = torch.empty((num_slides, k_pad), dtype=torch.int64, device=device)
    d = 0 if features is None else features.shape[1]
    rows = None if features is None else features.new_empty((num_slides, k, d))
    if num_slides == 0:
        return Selected(indices, values, rows, keys)
    _select_kernel[(num_slides, parts)](
        scores.contiguous(), cu_seqlens, n, first_row, None if running is None else running.keys,
        None if running is None else running.rows, None if running is None else running.indices,
        features, *((0, 1) if features is None else features.stride()),
        workspace.keys, workspace.tickets, indices, values, rows, keys, parts,
        K=k, K_PAD=k_pad, BLOCK=max(block, k_pad), D=d, BLOCK_D=GATHER_BLOCK,
        LOOKUP=min(k_pad, LOOKUP_BLOCK), BY_SCORE=by_score, num_warps=SELECT_WARPS,
    )  # fmt: skip
    return Selected(indices, values, rows, keys)


@triton.jit
def _pack(score, row):
    """The Triton twin of `keys.pack_keys`; row ^ 0x7FFFFFFF is MAX_ROW - row."""
    finite = tl.abs(score) < float("inf")
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (rank.to(tl.int64) << 32) | (row.to(tl.int64) ^ 0x7FFFFFFF)
    return tl.where(finite, key, _ABSENT)


@triton.jit
def _absorb(best, keys, K_PAD: tl.constexpr):
    """The K_PAD largest of both, as a bitonic sequence; `best` is one already."""
    return tl.maximum(tl.bitonic_merge(best), tl.topk(keys, K_PAD))


@triton.jit
def _select_kernel(
    scores_ptr, cu_seqlens_ptr, n, first_row, running_keys_ptr, running_rows_ptr, running_indices_ptr,
    features_ptr, features_stride, column_stride,
    workspace_ptr, tickets_ptr, indices_ptr, values_ptr, rows_ptr, keys_ptr, parts,
    K: tl.constexpr, K_PAD: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    LOOKUP: tl.constexpr, BY_SCORE: tl.constexpr,
):  # fmt: skip
    slide = tl.program_id(0)
    part = tl.program_id(1)
    if cu_seqlens_ptr is None:
        begin = tl.full((), 0, tl.int64)
        length = n
    else:
        begin = tl.load(cu_seqlens_ptr + slide).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + slide + 1) - begin).to(tl.int32)
    place = tl.arange(0, K_PAD)
    lane = tl.arange(0, BLOCK)

    per_part = tl.cdiv(tl.cdiv(length, BLOCK), parts)
    best = tl.full((K_PAD,), _ABSENT, tl.int64)
    for block in range(part * per_part, tl.minimum((part + 1) * per_part, tl.cdiv(length, BLOCK))):
        row = block * BLOCK + lane
        score = tl.load(scores_ptr + begin + row, mask=row < length, other=float("nan"))
        best = _absorb(best, _pack(score, first_row + row), K_PAD)
    parts_keys = workspace_ptr + slide.to(tl.int64) * parts * K_PAD
    tl.store(parts_keys + part * K_PAD + place, best)

    # Every thread's store lies before the ticket (Triton < 3.9 sets no barrier there by itself).
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets_ptr + slide, 1, sem="acq_rel", scope="gpu")
    if ticket == parts - 1:
        tl.debug_barrier()
        tl.store(tickets_ptr + slide, 0)
        best = tl.full((K_PAD,), _ABSENT, tl.int64)
        if running_keys_ptr is not None:
            # Sorted in descending order, which is a bitonic sequence too.
            best = tl.load(running_keys_ptr + slide * K_PAD + place)
        for start in range(0, parts * K_PAD, BLOCK):
            at = start + lane
            keys = tl.load(parts_keys + at, mask=at < parts * K_PAD, other=_ABSENT, cache_modifier=".cg")
            best = _absorb(best, keys, K_PAD)
        best = tl.bitonic_merge(best, descending=True)
        # K_PAD - K keys too many: they are the smallest.
        best = tl.where(place < K, best, _ABSENT)
        tl.store(keys_ptr + slide * K_PAD + place, best)
        if not BY_SCORE:
            # (row, score bits) instead of (score bits, row); absent places sort behind every row.
            swapped = (((best & 0xFFFFFFFF) ^ 0x7FFFFFFF) << 32) | ((best >> 32) & 0xFFFFFFFF)
            swapped = tl.where(best == _ABSENT, 0x7FFFFFFFFFFFFFFF, swapped)
            swapped = tl.sort(swapped)
            row = swapped >> 32
            rank = swapped.to(tl.int32)
            present = swapped != 0x7FFFFFFFFFFFFFFF
        else:
            row = (best & 0xFFFFFFFF) ^ 0x7FFFFFFF
            rank = (best >> 32).to(tl.int32)
            present = best != _ABSENT
        value = (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        kept = place < K
        tl.store(indices_ptr + slide * K + place, tl.where(present, row, -1), mask=kept)
        tl.store(values_ptr + slide * K + place, tl.where(present, value, float("-inf")), mask=kept)
        if rows_ptr is not None:
            new = present & (row >= first_row)
            source = features_ptr + (begin + row - first_row) * features_stride
            target = rows_ptr + (slide * K + place).to(tl.int64) * D
            if running_rows_ptr is not None:
                old = present & (row < first_row)
                old_place = tl.zeros((K_PAD,), tl.int32)
                for start in range(0, K_PAD, LOOKUP):
                    at = start + tl.arange(0, LOOKUP)
                    before = tl.load(running_indices_ptr + slide * K + at, mask=at < K, other=-2)
                    old_place += tl.sum(tl.where(before[None, :] == row[:, None], at[None, :], 0), axis=1)
                old_source = running_rows_ptr + (slide * K + old_place).to(tl.int64) * D
            for start in range(0, D, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                inside = (column < D)[None, :]
                offset = column.to(tl.int64) * column_stride
                x = tl.load(source[:, None] + offset[None, :], mask=new[:, None] & inside, other=0.0)
                if running_rows_ptr is not None:
                    y = tl.load(old_source[:, None] + column[None, :], mask=old[:, None] & inside, other=0.0)
                    x = tl.where(old[:, None], y, x)
                tl.store(target[:, None] + column[None, :], x, mask=kept[:, None] & inside)
