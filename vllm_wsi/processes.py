"""Worker processes that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def process_pool(workers: int, start: Callable[..., None] | None = None, *given: Any) -> ProcessPoolExecutor:
    """A pool of new processes, as CUDA and threads do not survive a fork.

    Args:
        start: called in each process first, with `given`.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _start_worker, (start, given))


def _start_worker(start: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    if start is not None:
        start(*given)


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its pool, whose processes would finish what they have, for hours."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
