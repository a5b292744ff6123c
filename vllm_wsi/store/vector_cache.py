"""Vectors of slides in memory, for the next question; and one reading for questions that come at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cachetools import LRUCache

from vllm_wsi.selection.slide_pools import SlideScores

CACHE_BYTES = 256 << 20  # 80 slides of 100,000 patches and 16 numbers each
POLL_SECONDS = 0.02


class SlideVectorCache:
    """Remembers what a `QuestionScorer` read of slides, by the digest of their scores; for many threads."""

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._lock = threading.Lock()
        self._vectors: LRUCache[str, SlideScores] = LRUCache(cache_bytes, getsizeof=lambda one: one.nbytes)
        self._reading: dict[str, tuple[threading.Lock, int]] = {}  # and how many threads want it

    def get(self, digest: str) -> SlideScores | None:
        with self._lock:
            return self._vectors.get(digest)

    def put(self, digest: str, known: SlideScores) -> None:
        with self._lock:
            if known.nbytes <= self._vectors.maxsize:
                self._vectors[digest] = known

    @contextmanager
    def alone(self, digest: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Keeps other threads that want this slide out of the `with`. `waiting`: called again and again; may raise."""
        with self._lock:
            lock, wanted = self._reading.get(digest, (threading.Lock(), 0))
            self._reading[digest] = lock, wanted + 1
        try:
            while not lock.acquire(timeout=POLL_SECONDS):
                waiting()
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._lock:
                lock, wanted = self._reading.pop(digest)
                if wanted > 1:
                    self._reading[digest] = lock, wanted - 1
