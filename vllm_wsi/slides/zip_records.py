"""The records of a zip archive, as `.pt` and `.npz` files are: what there is, and where its bytes lie."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

from .features import SlideError


def zip_records(path: Path) -> list[zipfile.ZipInfo]:
    """The archive's records, folders left out. Raises SlideError where it is damaged or encrypted."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = [record for record in archive.infolist() if not record.is_dir()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise SlideError(f"{path}: found a broken zip archive, wanted a .pt or .npz; it may be truncated") from error
    if any(record.flag_bits & 1 for record in records):
        raise SlideError(f"{path}: found an encrypted zip archive, wanted a .pt or .npz that can be read")
    return records


def data_offset(path: Path, record: zipfile.ZipInfo) -> int:
    """Where a stored record's bytes begin: behind its local header, whose length only the file itself tells."""
    with open(path, "rb") as file:
        file.seek(record.header_offset + 26)
        lengths = file.read(4)
    if len(lengths) < 4:
        raise SlideError(f"{path}: found a record beyond the end of the archive, wanted a whole file; it is truncated")
    name, extra = struct.unpack("<HH", lengths)
    return record.header_offset + 30 + name + extra
