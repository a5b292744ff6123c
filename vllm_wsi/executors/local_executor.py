"""Many items on one machine: by this process, or by a pool of several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool

from vllm_wsi.processes import process_pool

from .executor import Item, Result, Work


class LocalExecutor:
    """One worker is this process; several are a pool of processes on this machine.

    Args:
        workers: None: one for each core, or one where one fills the machine.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers

    def device_here(self, device: str) -> str:
        """As `Executor.device_here`."""
        return device

    def device_there(self, device: str) -> str:
        """As `Executor.device_there`."""
        return device

    def run(self, work: Work[Item, Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | None]]:
        """As `Executor.run`. An item that ends this process, where it is the only worker, ends all."""
        workers = self._workers or (1 if work.fills_machine else os.cpu_count() or 1)
        if workers > 1:
            items = list(items)
            workers = min(workers, len(items))
        if workers > 1:
            yield from _in_processes(work, list(items), min(workers, work.most_workers or workers))
        else:
            do = work.do_here or work.do
            for item in items:
                yield item, do(item)


def _in_processes(
    work: Work[Item, Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result | None]]:
    """A damaged slide can take a native reader's whole process down, and with it the pool: what the pool had not
    finished is then tried again, each item in a process of its own."""
    left = []
    for item, done in _pool(work, items, workers):
        if done is None:
            left.append(item)
        else:
            yield item, done.result()
    for item in left:
        for _, done in _pool(work, [item], 1):
            yield item, None if done is None else done.result()


def _pool(
    work: Work[Item, Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Future[Result] | None]]:
    """(item, None) where the process ended before the item did."""
    with process_pool(workers, work.start, *work.given) as pool:
        futures = {}
        for item in items:
            try:
                futures[pool.submit(work.do, item)] = item
            except BrokenProcessPool:
                yield item, None
        for future in as_completed(futures):
            broken = isinstance(future.exception(), BrokenProcessPool)
            yield futures[future], None if broken else future
