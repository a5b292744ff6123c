"""Threads for work that may wait for a disk. A pool that waits blocks neither another pool nor the end of the
process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

ENDING = "the server is shutting down"
STALL_SECONDS = 60  # that new slides may queue while no slide is begun or done


class SlidesStalled(Exception):
    """Work on a slide was refused, because it would wait behind slides that stand still; one sentence."""


class StallingPool:
    """Threads for work that may wait for a disk; such a wait cannot be interrupted.

    While all of them wait, further work queues for `STALL_SECONDS`; after that it is refused until some work begins or
    ends. So the queue stays bounded. The threads are daemons: one that waits for a disk does not hold up the end of the
    process, as the standard library's pools do.

    Args:
        name: of the threads.
        threads: at most so many, made as they are needed.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._most = name, threads
        self._work: SimpleQueue[tuple[Future, Callable[..., Any], tuple[object, ...]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._unfinished = 0
        self._moved = time.monotonic()  # when something was last begun or done
        self._closed = False

    def submit(self, function: Callable[..., T], *args: object) -> Future[T]:
        """Raises SlidesStalled."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise SlidesStalled(ENDING)
            seconds = time.monotonic() - self._moved
            if self._unfinished >= self._most and seconds >= STALL_SECONDS:
                raise SlidesStalled(
                    f"its {self._most} readers have waited {seconds:.0f} s for other slides; ask again later"
                )
            if self._threads < min(self._most, self._unfinished + 1):
                self._add_thread()
            self._unfinished += 1
        future.add_done_callback(self._done)  # also where a client that went away cancelled it
        self._work.put((future, function, args))
        return future

    def _add_thread(self) -> None:
        """Raises SlidesStalled where no thread can be started, and none is there yet."""
        thread = threading.Thread(target=self._serve, name=f"{self._name}-{self._threads + 1}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the machine's limit of threads
            if not self._threads:
                raise SlidesStalled(f"no reader can be started ({error}); ask again later") from error
        else:
            self._threads += 1

    def close(self) -> None:
        """Refuses further work, and drops what was not begun; the threads go with the process."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(Empty):
            while True:
                future, _, _ = self._work.get_nowait()
                if future.set_running_or_notify_cancel():
                    future.set_exception(SlidesStalled(ENDING))

    def _serve(self) -> None:
        while True:
            future, function, args = self._work.get()
            self._moved = time.monotonic()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function(*args)
            except BaseException as error:
                outcome: Callable[[], None] = partial(future.set_exception, error)
            else:
                outcome = partial(future.set_result, result)
            with contextlib.suppress(InvalidStateError):  # the service was closed meanwhile
                outcome()
            del future, function, args, outcome  # while it waits for the next, it holds no slide

    def _done(self, future: Future) -> None:
        with self._lock:
            self._unfinished -= 1
            if not future.cancelled():  # a client that goes away moves nothing
                self._moved = time.monotonic()
