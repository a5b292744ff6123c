"""Files and folders: writing them whole or not at all, and the suffixes by which slides and features are found."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vllm_wsi.errors import SettingsError

FEATURE_SUFFIXES = frozenset(
    (".safetensors", ".h5", ".hdf5", ".h5ad", ".npy", ".npz", ".pt", ".parquet", ".csv", ".zarr")
)  # fmt: skip
NON_TIFF_SUFFIXES = frozenset((".mrxs", ".czi", ".dcm", ".vms", ".vmu"))  # of slide images whose first bytes say little
# Of the slide images that a folder is searched for or a benchmark names; what a file is, its content says.
IMAGE_SUFFIXES = NON_TIFF_SUFFIXES | {".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".svslide", ".qptiff", ".btf"}
QC_SUFFIX = ".qc.png"  # of the pictures that `encode --qc` draws of tissue and patches


@contextmanager
def replacing(path: Path, mode: str = "wb", durable: bool = True, **options: Any) -> Iterator[IO[Any]]:
    """A file to write that takes the name `path` at the end of the `with`, whole; after an error it is removed.

    Args:
        mode: as for `open`, to write.
        durable: whole also after a power cut, which costs some milliseconds.
        options: as for `open`.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, **options) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def refuse_content(folder: Path) -> None:
    """Raises SettingsError where `folder`, which is to be written, is a file or a directory with content."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"{folder}: found a file or a directory with content, wanted a new directory")


@contextmanager
def new_folder(path: Path, is_main: bool = True) -> Iterator[Path]:
    """A folder to fill that takes the name `path` at the end of the `with`, whole.

    Until then it is called `path` with `.partial` behind. After an error it stays there, for a look at it; the next
    attempt begins it anew.

    Args:
        path: does not exist yet.
        is_main: of several processes that fill one folder together, the one that makes it and gives it its name.
    """
    partial = path.with_name(f"{path.name}.partial")
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    yield partial
    if is_main:
        mode = partial.stat().st_mode & 0o666  # safetensors makes files that their owner alone may read
        for file in partial.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
        os.rename(partial, path)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that appears under its name whole or not at all."""
    with replacing(path) as file:
        file.write(data)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Writes a CSV file, whole or not at all.

    Args:
        columns: None: those of all rows, in the order in which they first appear.
    """
    rows = list(rows)
    if columns is None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
