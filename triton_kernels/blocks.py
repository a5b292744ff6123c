"""Computes a function of each row of a slide on the CPU's cores; the bits do not depend on how the slide is cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from threading import Barrier, Lock

import torch
from torch import Tensor, get_num_threads, set_num_threads

BLOCK_BYTES = 1 << 19
LEAST_ROWS = 256


def block_rows(width: int) -> int:
    """Rows of one block: a power of two, as many as keep fp32 [rows, width] within 512 KiB, and at least 256.

    More rows spread PyTorch's fixed cost of an operation further, but a short slide pays for the padding: from d = 64
    to 1536, 1 MiB is 2 to 12 % faster on an EPYC for many blocks, and twice as slow for less than one.
    """
    rows = max(LEAST_ROWS, BLOCK_BYTES // 4 // width)
    return 1 << (rows.bit_length() - 1)


def map_blocks(features: Tensor, first_row: int, function: Callable[[Tensor], Tensor], out: Tensor, rows: int) -> None:
    """Fills out [n, ...] with a function of each row of features [n, d]; no gradient passes.

    Blocks start at multiples of `rows` of the slide and one that is not full is padded, so that a row meets the same
    matrix product however the slide is cut into chunks. On the CPU every block is one thread's, so that the bits do
    not depend on the number of cores either, and no thread waits for another within an operation.

    Args:
        first_row: row of `features[0]` within the slide.
        function: of a block [`rows`, d]; rows of zeros stand where the block is not full.
        rows: of a block, by `block_rows`.
    """
    n = len(features)
    lines = [0, *range(rows - first_row % rows, n, rows), n] if n else []
    blocks = list(pairwise(lines))
    waiting = iter(blocks)  # shared: a thread that is free takes the next

    def run() -> None:
        for start, stop in waiting:
            block = features[start:stop]
            if stop - start == rows:
                out[start:stop] = function(block)
                continue
            lead = (first_row + start) % rows
            padded = features.new_zeros((rows, features.shape[1]))
            padded[lead : lead + stop - start] = block
            out[start:stop] = function(padded)[lead : lead + stop - start]

    if features.device.type == "cpu":
        on_cores(run, len(blocks))
    else:
        with torch.no_grad():
            run()


def on_cores(work: Callable[[], None], most: int) -> None:
    """Runs the same work on every core, or on `most` of them, and returns when all have ended; no gradient passes.

    Raises:
        Exception: what the first of them raised.
    """

    def run() -> None:
        with torch.inference_mode():  # a mode is a thread's own; in this one, tensors made in either may be written
            work()

    with _starting:
        pool = _pool()
    runs = [pool.submit(run) for _ in range(min(most, _cores()))]
    wait(runs)  # also where one failed: the caller's tensors are its own again
    for one in runs:
        one.result()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


_starting = Lock()


@cache
def _pool() -> ThreadPoolExecutor:
    """A thread for each core, whose operations stay on it.

    `torch.set_num_threads` changes the calling thread, and also the default of threads that use PyTorch for the first
    time later. So each thread of the pool uses PyTorch once before it sets its own number to one, and the old default
    is restored afterwards. The function is called under a name of this module, because vLLM's CPU worker, where it runs
    in the same process, replaces `torch.set_num_threads` by one that does nothing.
    """
    cores, default = _cores(), get_num_threads()
    begun = Barrier(cores + 1)

    def begin() -> None:
        get_num_threads()
        set_num_threads(1)
        begun.wait()

    pool = ThreadPoolExecutor(cores, "vllm-wsi-score", initializer=begin)
    for _ in range(cores):
        pool.submit(int)
    begun.wait()
    set_num_threads(default)
    return pool


def _forget() -> None:
    """In a forked process: threads do not survive a fork."""
    _pool.cache_clear()
    _starting.release()


os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_forget)
