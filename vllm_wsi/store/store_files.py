"""Where a store keeps what, and which files of its folder are its own: no other is read or removed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from .stored_file import Kind

PREFIX = 3  # hexadecimal digits of a digest that name its folder: 4,096 folders
SUFFIX = ".safetensors"
FOLDER = re.compile(rf"[0-9a-f]{{{PREFIX}}}")
FILE = re.compile(rf"(?P<digest>[0-9a-f]{{40}})\.(?P<kind>{'|'.join(get_args(Kind))})\{SUFFIX}")
ASIDE = re.compile(rf"\.{FILE.pattern}\..+")


class StoredFile(NamedTuple):
    """One file of a store, as a walk finds it."""

    path: Path
    kind: str  # as `Kind` has it; "aside": not finished; "other": not ours
    num_bytes: int
    used: float  # seconds since 1970


def file_name(kind: Kind, digest: str) -> str:
    """Below the store's folder."""
    return f"{digest[:PREFIX]}/{digest}.{kind}{SUFFIX}"


def store_files(root: Path, on_fault: Callable[[OSError], None]) -> Iterator[StoredFile]:
    """What lies below a store's folder, in no order. Links are not followed.

    Args:
        on_fault: called where an inner folder cannot be read; the others are listed.

    Raises:
        OSError: the folder itself cannot be read.
    """
    with os.scandir(root) as folders:
        for folder in folders:
            if not FOLDER.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                            facts = entry.stat(follow_symlinks=False)
                            kind = _kind(folder.name, entry)
                            yield StoredFile(Path(entry.path), kind, facts.st_size, facts.st_mtime)
            except FileNotFoundError:
                continue
            except OSError as error:
                on_fault(error)


def _kind(folder: str, entry: os.DirEntry[str]) -> str:
    """Of a file in a folder of that name, by its own name."""
    found = FILE.fullmatch(entry.name)
    if found is not None and found["digest"].startswith(folder):
        return found["kind"] if entry.is_file(follow_symlinks=False) else "other"
    return "aside" if ASIDE.fullmatch(entry.name) else "other"
