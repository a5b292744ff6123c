"""A folder of finished selections and scores, shared by API servers, replicas and restarts without a server of its own.

Each file is named by the digest of what it depends on, written aside and renamed. It never changes, so whoever finds it
may use it, and two who write it write the same. It is read whole, not mapped: a mapped file that someone cuts short
would end the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors import SafetensorError
from torch import Tensor

from vllm_wsi.errors import SettingsError
from vllm_wsi.files import replacing
from vllm_wsi.selection.selection import Selection
from vllm_wsi.selection.slide_pools import SlideScores

from .selection_tensors import score_tensors, scores_of, selection_of, selection_tensors
from .store_files import StoredFile, file_name, store_files
from .store_settings import MAX_BYTES
from .stored_file import Kind, from_bytes, to_bytes

LOCK_PREFIX = 4  # hexadecimal digits of a digest that name its lock
LOCKS = "locks"
WALK_AFTER = 1 / 32
"""Of the bound: so much saves one process before it looks again at what all of them saved."""
EVICT_TO = 0.9
"""Of the bound, so that not every new file begins a search for the oldest."""
MAX_PRUNINGS = 3
"""In a row; a store on which nothing can be removed is tried again when the next file is saved."""
LEFT_BEHIND_SECONDS = 3600
"""A file that is still written aside after so long was left by a process that was killed."""
WAIT_SECONDS = 30.0
"""How long a slide waits for another process that selects it, before it is selected here too."""
POLL_SECONDS = 0.02

BUILD: dict[str, Callable[..., object]] = {"selection": selection_of, "scores": scores_of}
"""What is made of a file, by its kind."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class SelectionStore:
    """Selections and scores by digest. Whatever is wrong with its disk is a miss, said once and counted, no error.

    Args:
        folder: made where it is missing.
        max_bytes: of all files; the ones that were not used for the longest time go first.
        count: is told of each event and of how many bytes: "hit", "scores hit", "miss", "saved", "damaged", "evicted",
            "fault".

    Raises:
        SettingsError: the folder cannot be made.
    """

    def __init__(
        self, folder: Path, max_bytes: int = MAX_BYTES, count: Callable[[str, int], None] = lambda event, size: None
    ) -> None:
        self.folder, self.max_bytes, self._count = folder, max_bytes, count
        self._lock = threading.Lock()
        self._size: int | None = None  # None: nobody looked yet
        self._saved = self._saved_at_walk = 0  # bytes that this process saved, ever and before the last walk
        self._is_pruning = False
        self._said: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"selection_store: found {folder} ({error.strerror}), wanted a folder that can be made"
            ) from None

    def load_selection(self, digest: str, count_miss: bool = True) -> Selection | None:
        found = self._load("selection", digest, selection_of)
        if found is not None or count_miss:
            self._count("miss" if found is None else "hit", 0)
        return found

    def load_scores(self, digest: str) -> SlideScores | None:
        """Of all patches as they were, NaN and infinities too."""
        found = self._load("scores", digest, scores_of)
        if found is not None:
            self._count("scores hit", 0)
        return found

    def save_selection(self, digest: str, chosen: Selection) -> None:
        """Without the scores and places of all patches, which `save_scores` keeps."""
        self._save("selection", digest, lambda: selection_tensors(chosen))

    def save_scores(self, digest: str, known: SlideScores) -> None:
        self._save("scores", digest, lambda: (score_tensors(known), {}))

    @contextlib.contextmanager
    def alone(self, digest: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keeps other processes that ask for this digest out of the `with`, up to `WAIT_SECONDS` each.

        The lock is the system's own: it is free at once when its holder is killed. Where the file system has no locks
        nobody waits, and a slide may be selected twice.

        Args:
            waiting: called again and again meanwhile; may raise.
        """
        try:
            (self.folder / LOCKS).mkdir(exist_ok=True)
            handle = os.open(self.folder / LOCKS / digest[:LOCK_PREFIX], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self._fault("locks", error)
            yield
            return
        try:
            self._wait(handle, waiting)
            yield
        finally:
            os.close(handle)

    def _wait(self, handle: int, waiting: Callable[[], None]) -> None:
        until = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    return
            except OSError as error:
                self._fault("locks", error)
                return
            waiting()
            time.sleep(POLL_SECONDS)

    def path(self, kind: Kind, digest: str) -> Path:
        return self.folder / file_name(kind, digest)

    def files(self) -> Iterator[StoredFile]:
        """What lies there now, in no order. Raises OSError."""
        return store_files(self.folder, lambda error: self._fault("reading", error))

    def check(self) -> tuple[int, int]:
        """Reads every file and removes those that are damaged or foreign: (good, removed). Raises OSError."""
        good = removed = 0
        for file in list(self.files()):
            build = BUILD.get(file.kind)
            if build is None:
                continue
            digest = file.path.name.partition(".")[0]
            is_good = self._load(cast(Kind, file.kind), digest, build, mark=False) is not None
            good, removed = good + is_good, removed + (not is_good and not file.path.exists())
        return good, removed

    def prune(self, max_bytes: int | None = None) -> int:
        """Where the bound is exceeded, removes what was not used for the longest time until `EVICT_TO` of it is left.
        Also removes what killed processes left behind.

        Returns:
            Bytes that are left.

        Raises:
            OSError: the folder cannot be read.
        """
        bound = self.max_bytes if max_bytes is None else max_bytes
        saved_before = self._saved
        found = sorted((file for file in self.files() if file.kind != "other"), key=lambda file: file.used)
        size = sum(file.num_bytes for file in found)
        goal = size if size <= bound else int(EVICT_TO * bound)
        now = time.time()
        for file in found:
            left_behind = file.kind == "aside" and now - file.used > LEFT_BEHIND_SECONDS
            if (left_behind or (size > goal and file.kind != "aside")) and self._remove(file.path):
                size -= file.num_bytes
                self._count("evicted", file.num_bytes)
        with self._lock:
            self._saved_at_walk = saved_before
            self._size = size + self._saved - saved_before
        return size

    def _load(self, kind: Kind, digest: str, build: Callable[..., T], mark: bool = True) -> T | None:
        path = self.path(kind, digest)
        try:
            data = self._read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._fault("reading", error)
            return None
        try:
            found = build(*from_bytes(data, kind, digest))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            logger.warning("%s: found a damaged or foreign file, which is removed (%s)", path, error)
            self._count("damaged", len(data))
            self._remove(path)
            return None
        if mark:
            with contextlib.suppress(OSError):
                os.utime(path)  # used now
        return found

    def _read(self, path: Path) -> bytes:
        """b"" of anything but a file of a size that a store may hold, which nothing waits for."""
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return b""  # a link
            raise
        with open(handle, "rb") as file:
            facts = os.fstat(handle)
            return file.read() if stat.S_ISREG(facts.st_mode) and facts.st_size <= self.max_bytes else b""

    def _save(self, kind: Kind, digest: str, pack: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        path = self.path(kind, digest)
        try:
            if path.exists():
                return
            data = to_bytes(kind, digest, *pack())
            if len(data) > self.max_bytes:
                return
            path.parent.mkdir(exist_ok=True)
            with replacing(path, durable=False) as file:  # a checksum tells what a power cut left
                file.write(data)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            self._fault("writing", error)
            return
        self._count("saved", len(data))
        self._grown(len(data))

    def _grown(self, num_bytes: int) -> None:
        with self._lock:
            self._saved += num_bytes
            if self._size is not None:
                self._size += num_bytes
            if self._is_pruning or not self._may_be_full():
                return
            self._is_pruning = True
        threading.Thread(target=self._prune_aside, name="wsi-store-prune", daemon=True).start()

    def _may_be_full(self) -> bool:
        unseen = self._saved - self._saved_at_walk  # others may have saved as much
        return self._size is None or self._size > self.max_bytes or unseen > WALK_AFTER * self.max_bytes

    def _prune_aside(self) -> None:
        for _ in range(MAX_PRUNINGS):  # others may save meanwhile
            try:
                self.prune()
            except OSError as error:
                self._fault("reading", error)
            with self._lock:
                if self._size is None or not self._may_be_full():
                    break
        self._is_pruning = False

    def _remove(self, path: Path) -> bool:
        """Whether this call removed it."""
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            self._fault("removing", error)
            return False
        return True

    def _fault(self, doing: str, error: Exception) -> None:
        self._count("fault", 0)
        if doing not in self._said:
            self._said.add(doing)
            logger.warning(
                "selection store %s: %s failed (%s); slides are selected without it where it fails", self.folder, doing,
                getattr(error, "strerror", None) or error,
            )  # fmt: skip
