"""The selection service of an API server: one pool, one flight for each slide, one bounded cache."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cachetools import LRUCache
from numpy.typing import NDArray
from prometheus_client import Counter
from torch import Tensor, nn

from vllm_wsi.errors import SlideError
from vllm_wsi.selection.selector import FrozenScorer, Selection, SlideSelector
from vllm_wsi.slides import FeatureFile, SlideIdentity, open_features
from vllm_wsi.slides.feature_file import RowSource

from .stalling_pool import ENDING, SlidesStalled, StallingPool

T = TypeVar("T")

THREADS = 16
LOOK_UP_THREADS = 64
CACHE_BYTES = 256 << 20

SELECTIONS = Counter("vllm_wsi:selections", "Slides that were read and scored.")
PATCHES_READ = Counter("vllm_wsi:patches_read", "Patches that were read and scored.")
CACHE_HITS = Counter("vllm_wsi:selection_cache_hits", "Requests that were answered from a finished selection.")
JOINED = Counter("vllm_wsi:selections_joined", "Requests that waited for a selection already under way.")
READ_SECONDS = Counter("vllm_wsi:read_seconds", "Seconds spent in reading features.")
SCORE_SECONDS = Counter("vllm_wsi:score_seconds", "Seconds spent in scoring features and in Top-K.")


@dataclass(frozen=True)
class SlideRequest:
    """One slide of one request: a path, or an open file (which the service then closes)."""

    path: Path | None = None
    slide: FeatureFile | None = None
    k: int | None = None  # None: the server's K
    encoder: str | None = None  # which features, where a file holds several
    keep_all_scores: bool = False  # for a heat map: scores and places of all patches

    def identity(self) -> SlideIdentity:
        """Costs one stat for a path. Raises SlideError where there is no file."""
        if self.slide is not None:
            return self.slide.identity
        assert self.path is not None
        return SlideIdentity.of_file(self.path)

    def open(self) -> FeatureFile:
        if self.slide is not None:
            return self.slide
        assert self.path is not None
        return open_features(self.path, self.encoder)


@dataclass(frozen=True)
class SelectedSlide:
    """A finished selection, and what it was made of."""

    selection: Selection
    digest: str  # of slide identity, K, encoder and scorer: equal digests mean equal selections
    scorer: str  # digest of the scorer's weights, and the rule for encoders
    default_k: int  # the K of the service that selected
    request: SlideRequest | None  # None where the slide came by value and is gone

    @property
    def num_bytes(self) -> int:
        chosen = self.selection
        coords = 0 if chosen.coords is None else chosen.coords.nbytes
        metadata = sum(len(key) + len(value) for key, value in chosen.metadata.items())
        everything = 0 if chosen.all_scores is None else chosen.all_scores.nbytes
        everything += 0 if chosen.all_coords is None else chosen.all_coords.nbytes
        return (
            chosen.indices.nbytes
            + chosen.scores.nbytes
            + chosen.features.nbytes
            + coords
            + everything
            + metadata
            + 1024
        )


class SelectionService:
    """Selects each slide once, however many requests ask for it.

    Args:
        selector: of the served checkpoint.
        scorer: digest of its weights, and its rule for encoders.
        max_slide_tokens: largest K that one request may ask for.
        threads: slides that are read and scored at once.
        cache_bytes: bound of the finished selections that are remembered.
    """

    def __init__(
        self,
        selector: SlideSelector,
        scorer: str,
        max_slide_tokens: int,
        threads: int = THREADS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.selector, self.scorer, self.max_slide_tokens = selector, scorer, max_slide_tokens
        self.default_k = selector.num_slide_tokens
        self._pool = StallingPool("wsi-selection", threads)
        self._look_ups = StallingPool("wsi-look-up", LOOK_UP_THREADS)
        self._lock = threading.Lock()
        self._done: LRUCache[str, SelectedSlide] = LRUCache(cache_bytes, getsizeof=lambda done: done.num_bytes)
        self._under_way: dict[str, Future[SelectedSlide]] = {}
        self._closing = threading.Event()

    def submit(self, request: SlideRequest) -> Future[SelectedSlide]:
        """For a known slide a stat and a look-up.

        Raises:
            SlideError: there is no such file or K.
            SlidesStalled: it is a new slide, and all threads have long been waiting for others.
        """
        k = self.default_k if request.k is None else request.k
        if not 1 <= k <= self.max_slide_tokens:
            if request.slide is not None:
                request.slide.close()
            raise SlideError(f"k: found {k}, wanted 1 .. {self.max_slide_tokens}")
        identity = request.identity()
        parts = (identity, k, request.encoder, self.scorer, request.keep_all_scores)
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()
        with self._lock:
            done = self._done.get(digest)
            if done is None and (under_way := self._under_way.get(digest)) is not None:
                JOINED.inc()
                future = under_way
            elif done is None:
                try:
                    future = self._pool.submit(self._run, request, k, identity, digest)
                except SlidesStalled:
                    if request.slide is not None:
                        request.slide.close()
                    raise
                self._under_way[digest] = future
                return future
            else:
                CACHE_HITS.inc()
                future = Future()
                future.set_result(done)
        if request.slide is not None:
            request.slide.close()
        return future

    def select(self, request: SlideRequest) -> SelectedSlide:
        return self.submit(request).result()

    def close(self) -> None:
        """Calls off what is under way: requests get SlidesStalled, chunks that were not read yet are not read."""
        self._closing.set()
        self._pool.close()
        self._look_ups.close()
        with self._lock:
            under_way = list(self._under_way.values())
        for future in under_way:
            with contextlib.suppress(InvalidStateError):  # it has just ended by itself
                future.set_exception(SlidesStalled(ENDING))

    async def look_up(self, function: Callable[..., T], *args: object) -> T:
        """Runs what a mount that does not answer would hold up: paths and stats.

        On many threads of its own: neither the event loop waits, nor vLLM's few threads for all media, nor asyncio's.
        """
        return await asyncio.wrap_future(self._look_ups.submit(function, *args))

    def _run(self, request: SlideRequest, k: int, identity: SlideIdentity, digest: str) -> SelectedSlide:
        try:
            with request.open() as slide:
                if slide.identity != identity or request.identity() != identity:
                    raise SlideError(f"{slide.name}: the file changed while it was opened; ask again")
                slide.rows = _UntilClosed(slide.rows, self._closing)
                selection = self.selector.select(slide, k, request.keep_all_scores)
            if request.identity() != identity:
                raise SlideError(f"{slide.name}: the file changed while it was read; ask again")
            done = SelectedSlide(
                selection,
                digest,
                self.scorer,
                self.default_k,
                request if request.slide is None else None,
            )
            SELECTIONS.inc()
            PATCHES_READ.inc(selection.num_patches)
            READ_SECONDS.inc(selection.read_seconds)
            SCORE_SECONDS.inc(selection.score_seconds)
            with self._lock:
                if done.num_bytes <= self._done.maxsize:
                    self._done[digest] = done
            return done
        except OSError as error:
            name = request.slide.name if request.slide is not None else request.path
            raise SlideError(f"{name}: found an unreadable file ({error}), wanted a feature file") from error
        finally:
            with self._lock:
                self._under_way.pop(digest, None)


class _UntilClosed:
    """Rows of a slide, as long as the service is open."""

    def __init__(self, rows: RowSource, closing: threading.Event) -> None:
        self._rows, self._closing = rows, closing

    def read_into(self, start: int, out: NDArray) -> None:
        if self._closing.is_set():
            raise SlidesStalled(ENDING)
        self._rows.read_into(start, out)

    def close(self) -> None:
        self._rows.close()


async def finished(future: Future[SelectedSlide]) -> SelectedSlide:
    """Awaits a selection; a client that goes away cancels its own wait, not the others' selection."""
    return future.result() if future.done() else await asyncio.shield(asyncio.wrap_future(future))


_services: dict[tuple, SelectionService] = {}
_current: SelectionService | None = None
_services_lock = threading.Lock()


def service_for(selector: SlideSelector, scorer: str, max_slide_tokens: int) -> SelectionService:
    """The process-wide service of one checkpoint and setting, which also becomes the current one.

    vLLM makes processors anew all the time; the service, its cache and its pool stay.
    """
    global _current
    key = (scorer, selector.num_slide_tokens, selector.device_name, selector.max_patches, max_slide_tokens)
    with _services_lock:
        if key not in _services:
            _services[key] = SelectionService(selector, scorer, max_slide_tokens)
        _current = _services[key]
        return _current


def close_services() -> None:
    """Calls off all slides of this process; nothing is selected in it any more."""
    with _services_lock:
        services = list(_services.values())
        _services.clear()
    for service in services:
        service.close()


def current_service() -> SelectionService | None:
    """The service of the checkpoint that was set up last in this process; None where none was."""
    return _current


def scorer_digest(scorer: FrozenScorer) -> str:
    """Tells one scorer from another."""
    parts = [repr(scorer), *scorer.state_dict().values()] if isinstance(scorer, nn.Module) else scorer
    digest = hashlib.blake2b(digest_size=16)
    for value in parts:
        digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()
