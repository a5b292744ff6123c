"""A folder of finished selections and scores, shared by API servers, replicas and restarts without a server of its own.

Each file is named by the digest of what it depends on, written aside and renamed. It never changes, so whoever finds it
may use it, and two who write it write the same. It is read whole, not mapped: a mapped file that someone cuts short
would end the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from torch import Tensor

from vllm_wsi.errors import SettingsError
from vllm_wsi.files import replacing
from vllm_wsi.selection.selection import Selection

from .selection_tensors import selection_of, selection_tensors
from .store_settings import MAX_BYTES
from .stored_file import Kind, from_bytes, to_bytes

PREFIX = 3  # hexadecimal digits of a digest that name its folder: 4,096 folders
SUFFIX = ".safetensors"
LOCKS = "locks"
KINDS: tuple[Kind, ...] = get_args(Kind)
EVICT_TO = 0.9
"""Of the bound, so that not every new file begins a search for the oldest."""
MAX_PRUNINGS = 3
"""In a row; a store on which nothing can be removed is tried again when the next file is saved."""
LEFT_BEHIND_SECONDS = 3600
"""A file that is still written aside after so long was left by a process that was killed."""
WAIT_SECONDS = 30.0
"""How long a slide waits for another process that selects it, before it is selected here too."""
POLL_SECONDS = 0.02

logger = logging.getLogger(__name__)


class StoredFile(NamedTuple):
    """One file of a store, as a walk finds it."""

    path: Path
    kind: str  # of `KINDS`; "aside": not finished; anything else is not ours
    num_bytes: int
    used: float  # seconds since 1970


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
        self._saved = 0  # bytes that this process ever saved
        self._is_pruning = False
        self._said: set[str] = set()
        try:
            (folder / LOCKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"selection_store: found {folder} ({error.strerror}), wanted a folder that can be made"
            ) from None

    def load_selection(self, digest: str, count_miss: bool = True) -> Selection | None:
        found = self._load("selection", digest)
        if found is not None or count_miss:
            self._count("miss" if found is None else "hit", 0)
        return None if found is None else selection_of(*found)

    def load_scores(self, digest: str) -> Tensor | None:
        """fp32 [N], as they were, NaN and infinities too."""
        found = self._load("scores", digest)
        if found is not None:
            self._count("scores hit", 0)
        return None if found is None else found[0]["scores"]

    def save_selection(self, digest: str, chosen: Selection) -> None:
        """Without the scores and places of all patches, which `save_scores` keeps."""
        self._save("selection", digest, *selection_tensors(chosen))

    def save_scores(self, digest: str, scores: Tensor) -> None:
        self._save("scores", digest, {"scores": scores}, {})

    @contextlib.contextmanager
    def alone(self, digest: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keeps other processes that ask for this digest out of the `with`, up to `WAIT_SECONDS` each.

        The lock is the system's own: it is free at once when its holder is killed. Where the file system has no locks
        nobody waits, and a slide may be selected twice.

        Args:
            waiting: called again and again meanwhile; may raise.
        """
        try:
            handle = os.open(self.folder / LOCKS / digest[:PREFIX], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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
        return self.folder / digest[:PREFIX] / f"{digest}.{kind}{SUFFIX}"

    def files(self) -> Iterator[StoredFile]:
        """What lies there now, in no order. Raises OSError."""
        for folder in self.folder.iterdir():
            if len(folder.name) != PREFIX or not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        facts = entry.stat(follow_symlinks=False)
                        kind = entry.name.removesuffix(SUFFIX).rpartition(".")[2] if entry.name[0] != "." else "aside"
                        yield StoredFile(Path(entry.path), kind, facts.st_size, facts.st_mtime)

    def check(self) -> tuple[int, int]:
        """Reads every file and removes those that are damaged or foreign: (good, removed). Raises OSError."""
        good = removed = 0
        for file in list(self.files()):
            if file.kind not in KINDS:
                continue
            found = self._load(file.kind, file.path.name.partition(".")[0], mark=False)
            good, removed = good + (found is not None), removed + (found is None)
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
        found = sorted(self.files(), key=lambda file: file.used)
        size = sum(file.num_bytes for file in found)
        goal = size if size <= bound else int(EVICT_TO * bound)
        now = time.time()
        for file in found:
            left_behind = file.kind == "aside" and now - file.used > LEFT_BEHIND_SECONDS
            if left_behind or (size > goal and file.kind != "aside"):
                self._remove(file.path)
                size -= file.num_bytes
                self._count("evicted", file.num_bytes)
        with self._lock:
            self._size = size + self._saved - saved_before
        return size

    def _load(self, kind: Kind, digest: str, mark: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self.path(kind, digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._fault("reading", error)
            return None
        found = from_bytes(data, kind, digest)
        if found is None:
            logger.warning("%s: found a damaged or foreign file, which is removed", path)
            self._count("damaged", len(data))
            self._remove(path)
            return None
        if mark:
            with contextlib.suppress(OSError):
                os.utime(path)  # used now
        return found

    def _save(self, kind: Kind, digest: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        path = self.path(kind, digest)
        data = to_bytes(kind, digest, tensors, facts)
        if len(data) > self.max_bytes:
            return
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path, durable=False) as file:  # a checksum tells what a power cut left
                file.write(data)
        except OSError as error:
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
        return self._size is None or self._size > self.max_bytes

    def _prune_aside(self) -> None:
        full = True
        for _ in range(MAX_PRUNINGS):  # others may save meanwhile
            try:
                self.prune()
            except OSError as error:
                self._fault("reading", error)
            with self._lock:
                full = self._size is not None and self._may_be_full()
                self._is_pruning = full
            if not full:
                return
        self._is_pruning = False

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._fault("removing", error)

    def _fault(self, doing: str, error: OSError) -> None:
        self._count("fault", 0)
        if doing not in self._said:
            self._said.add(doing)
            logger.warning(
                "selection store %s: %s failed (%s); slides are selected without it where it fails", self.folder, doing,
                error.strerror or error,
            )  # fmt: skip
