"""Device code: the best of a slide by unique keys and bitonic networks, exact, with no buffer that could overflow.

Each program keeps the best of its part of a slide. Programs form groups: the last of a group to finish merges what its
group kept, and the last of these merges the groups, orders what is kept and gathers its rows, so that no program merges
hundreds of parts alone. An atomic counter tells who is last. Keys are unique (`keys.py`), so the result depends on
nothing but the scores: not on the number of programs, not on who finishes last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .buffers import MIN_GROUP, TICKETS

_ABSENT = tl.constexpr(-(2**63))
_MIN_GROUP, _TICKETS = tl.constexpr(MIN_GROUP), tl.constexpr(TICKETS)


@triton.jit
def pack(score, row):
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
def slide_bounds(cu_seqlens_ptr, slide, n):
    """(first row, length) of a slide; a batch of one slide has no `cu_seqlens`."""
    begin = tl.full((), 0, tl.int64)
    length = n
    if cu_seqlens_ptr is not None:
        begin = tl.load(cu_seqlens_ptr + slide).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + slide + 1) - begin).to(tl.int32)
    return begin, length


@triton.jit
def best_of_scores(scores_ptr, start, end, first_row, K_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """The K_PAD largest keys of the scores start .. end, as a bitonic sequence."""
    lane = tl.arange(0, BLOCK)
    best = tl.full((K_PAD,), _ABSENT, tl.int64)
    for at in range(start, end, BLOCK):
        row = at + lane
        score = tl.load(scores_ptr + row, mask=row < end, other=float("nan"))
        best = _absorb(best, pack(score, first_row + row), K_PAD)
    return best


@triton.jit
def _is_last(ticket_ptr, count):
    """Whether this program is the last of `count` to come here; all that the others stored before is then seen."""
    # Every thread's store lies before the ticket (Triton < 3.9 sets no barrier there by itself).
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    tl.debug_barrier()
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def _absorb_parts(best, keys_ptr, count, stride, K_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """`best` and what `count` parts kept, the first of whose keys lie `stride` keys apart."""
    for start in range(0, count * K_PAD, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key_ptr = keys_ptr + at // K_PAD * stride + at % K_PAD
        keys = tl.load(key_ptr, mask=at < count * K_PAD, other=_ABSENT, cache_modifier=".cg")
        best = _absorb(best, keys, K_PAD)
    return best


# Many parameters: as `merge_parts`, which is the only caller.
@triton.jit
def _keep(
    best, slide, begin, first_row, k, by_score, features_ptr, features_stride, column_stride,
    running_rows_ptr, running_indices_ptr, indices_ptr, values_ptr, rows_ptr, keys_ptr,
    K_PAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """Orders the slide's best, a bitonic sequence, writes them and gathers their rows."""
    place = tl.arange(0, K_PAD)
    best = tl.bitonic_merge(best, descending=True)
    # K_PAD - k keys too many: they are the smallest.
    best = tl.where(place < k, best, _ABSENT)
    tl.store(keys_ptr + slide * K_PAD + place, best)
    # Rising: by row, (row, score bits) instead of (score bits, row); by score, the keys' complements. An absent
    # place is the largest number in both, and so the last.
    by_row = (((best & 0xFFFFFFFF) ^ 0x7FFFFFFF) << 32) | ((best >> 32) & 0xFFFFFFFF)
    by_row = tl.where(best == _ABSENT, 0x7FFFFFFFFFFFFFFF, by_row)
    ordered = tl.sort(tl.where(by_score != 0, ~best, by_row))
    present = ordered != 0x7FFFFFFFFFFFFFFF
    row = tl.where(by_score != 0, (~ordered & 0xFFFFFFFF) ^ 0x7FFFFFFF, ordered >> 32)
    rank = tl.where(by_score != 0, ~ordered >> 32, ordered).to(tl.int32)
    value = (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    kept = place < k
    tl.store(indices_ptr + slide * k + place, tl.where(present, row, -1), mask=kept)
    tl.store(values_ptr + slide * k + place, tl.where(present, value, float("-inf")), mask=kept)
    if rows_ptr is not None:
        new = present & (row >= first_row)
        old = present & (row < first_row)
        source = features_ptr + (begin + row - first_row) * features_stride
        target = rows_ptr + (slide * k + place).to(tl.int64) * D
        old_place = tl.zeros((K_PAD,), tl.int32)
        for start in range(0, K_PAD, LOOKUP):
            at = start + tl.arange(0, LOOKUP)
            before = tl.load(running_indices_ptr + slide * k + at, mask=at < k, other=-2)
            old_place += tl.sum(tl.where(before[None, :] == row[:, None], at[None, :], 0), axis=1)
        old_source = running_rows_ptr + (slide * k + old_place).to(tl.int64) * D
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            inside = (column < D)[None, :]
            offset = column.to(tl.int64) * column_stride
            x = tl.load(source[:, None] + offset[None, :], mask=new[:, None] & inside, other=0.0)
            y = tl.load(old_source[:, None] + column[None, :], mask=old[:, None] & inside, other=0.0)
            tl.store(target[:, None] + column[None, :], tl.where(old[:, None], y, x), mask=kept[:, None] & inside)


# Many parameters: a Triton function takes each pointer and each size by itself.
@triton.jit
def merge_parts(
    best, part, parts, slide, begin, first_row, k, by_score,
    features_ptr, features_stride, column_stride, running_keys_ptr, running_rows_ptr, running_indices_ptr,
    workspace_ptr, tickets_ptr, indices_ptr, values_ptr, rows_ptr, keys_ptr,
    K_PAD: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """Leaves a part's best in the workspace; the last part of a slide merges all, orders them and gathers their rows.

    Args:
        best: int64 [K_PAD], the part's largest keys.
        begin: where the slide begins in the features.
        running_keys_ptr: what the slide's earlier chunks kept; all absent where there is none.
        rows_ptr: of the gathered rows; None: none are gathered.
    """
    GROUP: tl.constexpr = BLOCK // K_PAD if BLOCK // K_PAD > _MIN_GROUP else _MIN_GROUP
    place = tl.arange(0, K_PAD)
    parts_keys = workspace_ptr + slide.to(tl.int64) * parts * K_PAD
    tickets = tickets_ptr + slide * _TICKETS  # the slide's own, then one for each group
    tl.store(parts_keys + part * K_PAD + place, best)
    count, stride, goes_on = parts, tl.full((), K_PAD, tl.int32), tl.full((), True, tl.int1)
    if parts > GROUP:
        count, stride, group = tl.cdiv(parts, GROUP), stride * GROUP, part // GROUP
        group_keys, members = parts_keys + group * stride, tl.minimum(GROUP, parts - group * GROUP)
        goes_on = _is_last(tickets + 1 + group, members)
        if goes_on:
            best = _absorb_parts(tl.full((K_PAD,), _ABSENT, tl.int64), group_keys, members, K_PAD, K_PAD, BLOCK)
            tl.debug_barrier()  # all threads have read what the next line replaces
            tl.store(group_keys + place, best)
    if goes_on:  # noqa: SIM102 - Triton evaluates both sides of an `and`
        if _is_last(tickets, count):
            # Sorted in descending order, which is a bitonic sequence too.
            best = tl.load(running_keys_ptr + slide * K_PAD + place)
            best = _absorb_parts(best, parts_keys, count, stride, K_PAD, BLOCK)
            _keep(
                best, slide, begin, first_row, k, by_score, features_ptr, features_stride, column_stride,
                running_rows_ptr, running_indices_ptr, indices_ptr, values_ptr, rows_ptr, keys_ptr,
                K_PAD, D, BLOCK_D, LOOKUP,
            )  # fmt: skip
