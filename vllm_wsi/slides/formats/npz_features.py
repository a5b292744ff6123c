"""Feature files of numpy.savez, plain or compressed; pickled members are never read."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.byte_source import LocalBytes
from vllm_wsi.slides.feature_file import FeatureFile, RowSource, check_matrix, metadata_strings
from vllm_wsi.slides.identity import SlideIdentity

from .named_arrays import Array, features_key, find_coords
from .npy_features import CONVERT, check_order, read_npy_header
from .rows import RawRows, stored_array
from .zip_records import ZIP_ERRORS, broken, data_offset, open_record

CONVERT_NPZ = CONVERT.format('numpy.load(FILE)["KEY"]')
MAX_UNPACKED = 64 << 20  # bytes of an array that is read whole
MAX_MEMBERS = 100
SKIP_BYTES = 1 << 20


class _Member(NamedTuple):
    """An array of the archive, whose numbers begin `offset` bytes into the unpacked record."""

    record: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    offset: int


class DeflatedRows:
    """Rows of a compressed array: unpacked from the front as they are asked for, and again where one goes back."""

    near_rows = 1 << 10  # what lies between is unpacked in any case

    def __init__(self, path: Path, member: _Member, feature_dim: int) -> None:
        self._path, self._begin, self._row_bytes = path, member.offset, feature_dim * member.dtype.itemsize
        self._archive = zipfile.ZipFile(path)
        try:
            self._file = self._archive.open(member.record)
        except ZIP_ERRORS as error:
            self._archive.close()
            raise broken(path) from error

    def read_into(self, start: int, out: NDArray) -> None:
        view = memoryview(out.view(np.uint8).reshape(-1).data) if out.size else memoryview(b"")
        try:
            self._go_to(self._begin + start * self._row_bytes)
            while view:
                data = self._file.read(min(len(view), SKIP_BYTES))
                if not data:
                    raise SlideError(f"{self._path}: found the end of the archive while reading rows; it was truncated")
                view[: len(data)], view = data, view[len(data) :]
        except SlideError:
            raise
        except ZIP_ERRORS as error:
            raise SlideError(
                f"{self._path}: found rows that cannot be unpacked from {start} on, wanted features"
            ) from error

    def _go_to(self, place: int) -> None:
        if place < self._file.tell():
            self._file.seek(0)
        while (left := place - self._file.tell()) > 0 and self._file.read(min(left, SKIP_BYTES)):
            pass

    def close(self) -> None:
        self._file.close()
        self._archive.close()


def open_npz(path: Path, identity: SlideIdentity, records: Sequence[zipfile.ZipInfo]) -> FeatureFile:
    """Opens features under any of the field's names, or the only array of an archive, with coordinates beside them."""
    if path.name.endswith(".index.npz"):
        raise SlideError(f"{path}: found slideflow's index of tile centres, wanted the features beside it (.pt)")
    if len(records) > MAX_MEMBERS:
        raise SlideError(f"{path}: found {len(records)} arrays, wanted at most {MAX_MEMBERS}")
    members = {record.filename.removesuffix(".npy"): _member(path, record) for record in records}
    key = next(iter(members)) if list(members) == ["arr_0"] else features_key(path, members, f"; {CONVERT_NPZ}")
    member = members[key]
    if member.dtype.hasobject:
        convert = CONVERT.format(f'numpy.load(FILE, allow_pickle=True)["{key}"]')
        raise SlideError(f"{path}: found pickled Python objects as {key!r}, wanted a float array (N, d); {convert}")
    n, d = check_matrix(path, key, member.shape, member.dtype.name)
    _check(path, key, member)
    attributes, skipped = _attributes(path, members)
    arrays = {
        name: Array(one.shape, one.dtype.name, partial(_read, path, name, one))
        for name, one in members.items()
        if name != key and not one.dtype.hasobject
    }
    coords = find_coords(path, arrays, n, attributes)
    rows: RowSource
    if member.record.compress_type == zipfile.ZIP_STORED:
        rows = RawRows(LocalBytes(path), data_offset(path, member.record) + member.offset, member.dtype, n, d)
    else:
        rows = DeflatedRows(path, member, d)
    remarks = [*coords.remarks, *(f"{name}: pickled Python objects are not read" for name in skipped)]
    return FeatureFile(
        str(path), "npz", key, n, d, member.dtype.name, rows, identity, metadata_strings(path, attributes),
        **coords.fields(), remarks=tuple(remarks),
    )  # fmt: skip


def _member(path: Path, record: zipfile.ZipInfo) -> _Member:
    if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or not record.filename.endswith(".npy"):
        raise SlideError(
            f"{path}: found a zip archive of other things, wanted a .npz of arrays as numpy.savez writes it"
        )
    with open_record(path, record) as file:
        shape, fortran, dtype = read_npy_header(path, record.filename.removesuffix(".npy"), file)
        return _Member(record, shape, fortran, dtype, file.tell())


def _check(path: Path, key: str, member: _Member) -> None:
    check_order(path, key, member.shape, member.fortran, member.dtype)
    wanted = member.offset + int(np.prod(member.shape, dtype=object)) * member.dtype.itemsize
    if member.record.file_size != wanted:
        raise SlideError(
            f"{path}: {key}: found a record of {member.record.file_size} bytes, wanted {wanted} by its own header"
        )


def _read(path: Path, key: str, member: _Member) -> NDArray:
    _check(path, key, member)
    if member.record.file_size > MAX_UNPACKED:
        raise SlideError(
            f"{path}: {key}: found {member.record.file_size} bytes, wanted at most {MAX_UNPACKED} beside the features"
        )
    if member.record.compress_type == zipfile.ZIP_STORED:
        begin = data_offset(path, member.record) + member.offset
        with LocalBytes(path) as source:
            return stored_array(source, key, begin, member.dtype, member.shape)
    with open_record(path, member.record) as file:
        data = file.read(member.record.file_size)
    if len(data) != member.record.file_size:
        raise SlideError(f"{path}: {key}: found {len(data)} bytes, wanted {member.record.file_size}; it is truncated")
    return np.frombuffer(data, member.dtype, offset=member.offset).reshape(member.shape)


def _attributes(path: Path, members: dict[str, _Member]) -> tuple[dict[str, object], list[str]]:
    """(single values beside the features, names of pickled members)."""
    values: dict[str, object] = {}
    pickled = []
    for name, member in members.items():
        if member.dtype.hasobject:
            pickled.append(name)
        elif member.shape in ((), (1,)) and member.dtype.kind in "iufbUS" and member.dtype.itemsize <= 4096:
            values[name] = _read(path, name, member).reshape(-1)[0]
    return values, pickled
