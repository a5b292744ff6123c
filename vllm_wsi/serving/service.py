"""The selection service of an API server: a pool of readers, a bounded cache, and one selection for all requests that
ask for the same slide at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cachetools import LRUCache
from numpy.typing import NDArray
from vllm.logger import init_logger

from vllm_wsi.errors import SlideError
from vllm_wsi.model.question_reader import QuestionReader
from vllm_wsi.selection.calibration import Calibration
from vllm_wsi.selection.question_selection import Question
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import FeatureFile
from vllm_wsi.slides.feature_file import RowSource, shown
from vllm_wsi.store.selection_key import SelectionKey
from vllm_wsi.store.selection_store import SelectionStore
from vllm_wsi.store.stored_selector import StoredSelector, unchanged

from . import metrics
from .client_errors import naming_the_file_alone
from .slide_request import SelectedSlide, SlideRequest
from .stalling_pool import ENDING, SlidesStalled, StallingPool

THREADS = 16
LOOK_UP_THREADS = 64
CACHE_BYTES = 256 << 20

logger = init_logger(f"vllm.{__name__}")  # vLLM shows its own loggers alone


class SelectionService:
    """Selects each slide once, however many requests ask for it.

    Args:
        selector: of the served checkpoint.
        scorer: digest of its weights, and its rule for encoders.
        max_slide_tokens: largest K that one request may ask for.
        store: selections that outlive this process; None: there are none.
        questions: of a checkpoint whose scorer hears the question; None: it hears none.
        calibration: what was fitted to the checkpoint on validation; None: nothing was.
        threads: slides that are read and scored at once.
        cache_bytes: bound of the finished selections that are remembered.
    """

    def __init__(
        self,
        selector: SlideSelector,
        scorer: str,
        max_slide_tokens: int,
        store: SelectionStore | None = None,
        questions: QuestionReader | None = None,
        calibration: Calibration | None = None,
        threads: int = THREADS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.selector, self.scorer, self.max_slide_tokens = selector, scorer, max_slide_tokens
        self.default_k = selector.num_slide_tokens
        self._stored, self.questions = StoredSelector(selector, scorer, store), questions
        self.calibration = calibration
        self._pool = StallingPool("wsi-selection", threads)
        self._elsewhere = StallingPool("wsi-remote", threads)  # so that slow servers hold up no slide of this machine
        self._look_ups = StallingPool("wsi-look-up", LOOK_UP_THREADS)
        self._lock = threading.Lock()
        self._done: LRUCache[str, SelectedSlide] = LRUCache(cache_bytes, getsizeof=lambda done: done.num_bytes)
        self._under_way: dict[str, Future[SelectedSlide]] = {}
        self._closing = threading.Event()
        self._device = ""  # that scores now; "" before the start
        self.fetching: dict[SlideRequest, asyncio.Task[SelectedSlide]] = {}  # from the web; the event loop's own
        logger.info(
            "slides: scorer %s, K = %d (at most %d by request), on %s, encoder %s, %d readers, cache of %d MiB, "
            "store %s",
            scorer.partition(":")[0][:12], self.default_k, max_slide_tokens, selector.device.wanted,
            selector.encoder.encoder or "not recorded", threads, cache_bytes >> 20,
            "none" if store is None else store.folder,
        )  # fmt: skip

    def submit(self, request: SlideRequest) -> Future[SelectedSlide]:
        """Costs a stat and a look-up for a slide whose selection is finished or under way.

        Raises:
            SlideError: there is no such file or K.
            SlidesStalled: it is a new slide, and all threads have long been waiting for others.
        """
        try:
            k, key, digest = self._key(request)
            with self._lock:
                future = self._finished_or_under_way(digest)
                if future is None:
                    run = _Run(request, k, key, digest, time.monotonic())
                    future = self._under_way[digest] = self._queue(run)
                    return future
        except BaseException:
            request.close()
            raise
        request.close()
        return future

    def _key(self, request: SlideRequest) -> tuple[int, SelectionKey, str]:
        """(K, key, digest) of what is asked."""
        k = self.default_k if request.k is None else request.k
        least = self.selector.summary_tokens + 1
        if not least <= k <= self.max_slide_tokens:
            raise SlideError(f"k: found {k}, wanted {least} .. {self.max_slide_tokens}")
        if request.question is not None and self.questions is None:
            raise SlideError("q: found a question for a checkpoint whose scorer hears none, wanted a URL without it")
        key = SelectionKey(request.identity(), request.encoder, self.scorer, self.start())
        return k, key, request.digest(key, k, self._question(request))

    def known(self, request: SlideRequest) -> Future[SelectedSlide] | None:
        """A selection for which the slide's file is not needed: remembered, under way, or stored.

        Raises:
            SlideError: there is no such K.
        """
        k, key, digest = self._key(request)
        with self._lock:
            future = self._finished_or_under_way(digest)
        if future is not None or request.keep_all_scores:
            return future
        found = self._stored.stored(key, k, False, self._question(request))
        if found is None:
            return None
        done = SelectedSlide(found, digest, self.scorer, self.default_k, request, "store")
        self._remember(digest, replace(done, source="memory"))
        _report(request.name, done, waited=0.0, took=0.0)
        future = Future()
        future.set_result(done)
        return future

    async def known_async(self, request: SlideRequest) -> SelectedSlide | None:
        """The same, awaited; the store is read on a thread of its own."""
        found: Future[SelectedSlide] | None = await asyncio.wrap_future(self._look_ups.submit(self.known, request))
        if found is None:
            return None
        selected: SelectedSlide = await asyncio.shield(asyncio.wrap_future(found))
        return selected

    def select(self, request: SlideRequest) -> SelectedSlide:
        return self.submit(request).result()

    async def select_async(
        self, request: SlideRequest | Callable[[], SlideRequest], elsewhere: bool = False
    ) -> SelectedSlide:
        """The same, awaited; errors name the file without its folder.

        A client that goes away cancels its own wait, not the selection, for which others may wait too.

        Args:
            request: or a function that finds it, for what a mount that does not answer would hold up (paths, stats). It
                runs on threads of its own: neither the event loop waits, nor vLLM's few threads for all media.
            elsewhere: it waits for another machine, and so on the threads for such.
        """
        if callable(request):
            pool = self._elsewhere if elsewhere else self._look_ups
            path, future = await asyncio.wrap_future(pool.submit(self._find_and_submit, request))
        else:
            path, future = request.path, self.submit(request)
        with naming_the_file_alone(path):
            return future.result() if future.done() else await asyncio.shield(asyncio.wrap_future(future))

    def _find_and_submit(self, find: Callable[[], SlideRequest]) -> tuple[Path | None, Future[SelectedSlide]]:
        """In one thread, because each hop between threads costs half a millisecond."""
        request = find()
        with naming_the_file_alone(request.path):
            return request.path, self.submit(request)

    def start(self, rank: int = 0) -> str:
        """Starts the scoring device, which may compile for a minute, so that no request waits for it. Its name.

        Raises:
            SetupError: a GPU that was asked for by name is not fit.
        """
        name = self.selector.start(rank).name
        if name != self._device:
            logger.info("%s", self.selector.device.told)
            metrics.show_device(name)
            self._device = name
        return name

    def _queue(self, run: _Run) -> Future[SelectedSlide]:
        metrics.QUEUED.inc()
        try:
            pool = self._pool if run.request.open_told is None else self._elsewhere
            return pool.submit(self._run, run)
        except SlidesStalled:
            metrics.QUEUED.dec()
            raise

    def _finished_or_under_way(self, digest: str) -> Future[SelectedSlide] | None:
        if (done := self._done.get(digest)) is not None:
            metrics.CACHE_HITS.inc()
            future: Future[SelectedSlide] = Future()
            future.set_result(done)
            return future
        if (under_way := self._under_way.get(digest)) is not None:
            metrics.JOINED.inc()
        return under_way

    def close(self) -> None:
        """Ends what is under way: requests get SlidesStalled, and no further chunk is read."""
        self._closing.set()
        for pool in (self._pool, self._elsewhere, self._look_ups):
            pool.close()
        with self._lock:
            under_way = list(self._under_way.values())
        for future in under_way:
            with contextlib.suppress(InvalidStateError):  # it has just ended by itself
                future.set_exception(SlidesStalled(ENDING))

    def _run(self, run: _Run) -> SelectedSlide:
        request, began = run.request, time.monotonic()
        metrics.QUEUED.dec()
        try:
            with metrics.RUNNING.track_inprogress():
                question = self._question(request)
                selection, source = self._stored.select(
                    run.key, lambda: self._opened(run), run.k, request.keep_all_scores, self._check_open, question
                )
            # Not `run.digest` where a GPU left the slide to the CPU: two devices' scores never share a key.
            digest = request.digest(run.key._replace(scored_on=selection.scored_on), run.k, question)
            kept_request = replace(request, open_told=None) if request.slide is None else None
            done = SelectedSlide(selection, digest, self.scorer, self.default_k, kept_request, source)
            self._remember(run.digest, replace(done, source="memory"))
            if selection.fallback is not None:
                metrics.FALLBACKS.labels(selection.fallback).inc()
                self.start()
            _report(request.name, done, waited=began - run.asked, took=time.monotonic() - began)
            return done
        except OSError as error:
            name = request.path or request.name
            raise SlideError(f"{name}: found an unreadable file ({error}), wanted a feature file") from error
        finally:
            request.close()
            with self._lock:
                self._under_way.pop(run.digest, None)

    def _question(self, request: SlideRequest) -> Question | None:
        if request.question is None:
            return None
        assert self.questions is not None
        return Question(request.question, self.questions.query(request.question))

    @contextlib.contextmanager
    def _opened(self, run: _Run) -> Iterator[FeatureFile]:
        with unchanged(run.request.open, run.request.identity, run.key.identity) as slide:
            slide.rows = _UntilClosed(slide.rows, self._check_open)
            yield slide

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise SlidesStalled(ENDING)

    def _remember(self, asked: str, done: SelectedSlide) -> None:
        with self._lock:
            if done.num_bytes <= self._done.maxsize:
                self._done[asked] = done
            metrics.CACHE_BYTES_USED.set(self._done.currsize)
            metrics.CACHE_SLIDES.set(len(self._done))


class _Run(NamedTuple):
    """One slide to be read and scored."""

    request: SlideRequest
    k: int
    key: SelectionKey
    digest: str
    asked: float  # time.monotonic()


def _report(name: str, done: SelectedSlide, waited: float, took: float) -> None:
    """The numbers of a slide that was not remembered, and one line for the log."""
    selection = done.selection
    if done.source == "file":
        metrics.SELECTIONS.inc()
        metrics.PATCHES_READ.inc(selection.num_patches)
        metrics.READ_SECONDS.observe(selection.read_seconds)
        metrics.SCORE_SECONDS.observe(selection.score_seconds)
        metrics.SELECTION_SECONDS.observe(waited + took)
    logger.info(
        "selected %d of %d patches of %s in %.3f s by the %s (read %.3f s, scored %.3f s, waited %.3f s before)",
        len(selection.indices), selection.num_patches, shown(name, 80), took, done.source,
        selection.read_seconds, selection.score_seconds, waited,
    )  # fmt: skip


class _UntilClosed:
    """Rows of a slide, as long as the service is open."""

    def __init__(self, rows: RowSource, check_open: Callable[[], None]) -> None:
        self._rows, self._check_open, self.near_rows = rows, check_open, rows.near_rows

    def read_into(self, start: int, out: NDArray) -> None:
        self._check_open()
        self._rows.read_into(start, out)

    def close(self) -> None:
        self._rows.close()
