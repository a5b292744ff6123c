"""The identity of a slide: which file, and which state of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import NamedTuple

from vllm_wsi.errors import SlideError

ZARR_FILES = ("zarr.json", ".zgroup", ".zarray")  # one of them makes a directory a zarr store
MAX_STORE_FILES = 20_000  # of a zarr store, each of which is looked at for its identity
PICTURES = frozenset(("images", "labels", "points"))  # SpatialData's groups that hold no features, often in many files


class SlideIdentity(NamedTuple):
    """Tells one state of one file from every other: a file replaced under its name has another identity."""

    path: str  # resolved; for features in memory a digest of them
    size: int  # bytes
    mtime_ns: int = 0
    inode: int = 0  # 0: not a file
    ctime_ns: int = 0  # changes with every write, also where a tool restores the mtime
    content: str = ""  # of a zarr store: digest of the names and stats of its files

    @classmethod
    def of_file(cls, path: Path) -> SlideIdentity:
        """Costs one stat, and one for each file of a zarr store.

        Raises:
            SlideError: there is neither a regular file nor a zarr store.
        """
        try:
            path = path.resolve()
            stat = path.stat()
        except OSError as error:
            raise SlideError(f"{path}: found no readable file ({error.strerror}), wanted a feature file") from None
        except (ValueError, RuntimeError):  # a NUL in the name; a loop of links
            raise SlideError(f"{str(path)!r}: found an impossible file name, wanted a feature file") from None
        if S_ISDIR(stat.st_mode):
            if not is_store(path):
                raise SlideError(f"{path}: found a directory that is no zarr store, wanted a feature file")
            size, digest = _store_digest(path)
            return cls(str(path), size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns, digest)
        if not S_ISREG(stat.st_mode):
            raise SlideError(f"{path}: found a pipe, socket or device, wanted a feature file")
        return cls(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)

    def record(self) -> dict[str, str | int | None]:
        """What a feature file's metadata say, as a JSON object, of the source that it was made of.

        A copy of the source that keeps its name and mtime is the same source, also on another disk.
        """
        return {"name": Path(self.path).name, "size": self.size, "mtime_ns": self.mtime_ns, "content": self.content}

    def refuse_change(self, path: Path) -> None:
        """Raises SlideError where the file at `path`, which had this identity, has another one now."""
        if SlideIdentity.of_file(path) != self:
            raise SlideError(f"{path}: found a file that changed while it was read, wanted a finished one")


def read_record(text: str | None) -> dict[str, object]:
    """A record of a source (`SlideIdentity.record`) out of metadata; empty where there is none."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def is_store(path: Path) -> bool:
    """Whether that directory is a zarr store."""
    return any(os.path.isfile(path / name) for name in ZARR_FILES)  # False too where it may not be read


def _store_digest(root: Path) -> tuple[int, str]:
    """(bytes, digest of names and stats) of a zarr store's files, less those of its pictures.

    Raises:
        SlideError: a link, which could lead anywhere, something else that is no file, or more files than allowed.
    """
    seen: list[tuple[str, int, int, int, int]] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if name in PICTURES:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                    elif not entry.is_file(follow_symlinks=False):
                        raise SlideError(f"{root}: {name}: found a link or a device, wanted files of this store alone")
                    stat = entry.stat(follow_symlinks=False)
                    seen.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns))
                    if len(seen) > MAX_STORE_FILES:
                        raise SlideError(
                            f"{root}: found a store of more than {MAX_STORE_FILES} files, wanted fewer, larger chunks"
                        )
        except OSError as error:
            raise SlideError(f"{root}: found an unreadable store ({error.strerror}), wanted a feature file") from None
    digest = hashlib.blake2b(repr(sorted(seen)).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return sum(size for _, size, *_ in seen), digest
