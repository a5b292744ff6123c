"""The records of a zip archive, as `.pt` and `.npz` files are: what there is, and where its bytes lie."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vllm_wsi.errors import SlideError

# What zipfile raises for damaged archives, and for records in a way of packing that it does not know.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, RuntimeError, EOFError, struct.error)


def zip_records(path: Path) -> list[zipfile.ZipInfo]:
    """The archive's records, folders left out. Raises SlideError where it is damaged or encrypted."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = [record for record in archive.infolist() if not record.is_dir()]
    except ZIP_ERRORS as error:
        raise broken(path) from error
    if any(record.flag_bits & 1 for record in records):
        raise SlideError(f"{path}: found an encrypted zip archive, wanted a .pt or .npz that can be read")
    return records


def broken(path: Path) -> SlideError:
    return SlideError(f"{path}: found a broken zip archive, wanted a .pt or .npz; it may be truncated")


@contextmanager
def open_record(path: Path, record: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    """A record's unpacked bytes; SlideError where they are damaged."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(record) as file:
            yield file
    except SlideError:
        raise
    except ZIP_ERRORS as error:
        raise broken(path) from error


def data_offset(path: Path, record: zipfile.ZipInfo) -> int:
    """Where a stored record's bytes begin: behind its local header, whose length only the file itself tells."""
    with open(path, "rb") as file:
        file.seek(record.header_offset + 26)
        lengths = file.read(4)
    if len(lengths) < 4:
        raise SlideError(f"{path}: found a record beyond the end of the archive, wanted a whole file; it is truncated")
    name, extra = struct.unpack("<HH", lengths)
    return record.header_offset + 30 + name + extra
