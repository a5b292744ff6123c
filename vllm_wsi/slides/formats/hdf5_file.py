"""Datasets of an HDF5 file, from that file alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.byte_source import ByteSource, local_path
from vllm_wsi.slides.feature_file import RowSource

from .hdf5_access import Hdf5Access
from .rows import RawRows, near_rows

MAX_CHUNK_BYTES = 64 << 20
MAX_UNPACKED = 64 << 20  # bytes of a dataset that is read whole


def damaged(name: str) -> SlideError:
    return SlideError(
        f"{name}: found an HDF5 signature but no readable file, wanted HDF5; it is truncated, damaged or being written"
    )


class Hdf5Rows:
    """Rows of a chunked or compressed dataset, through the HDF5 library (which serves one thread at a time)."""

    def __init__(self, source: ByteSource, key: str) -> None:
        self._source, self._path = source, local_path(source)
        self._file = h5py.File(self._path, "r", locking=False)
        self._dataset = dataset = local_dataset(source.name, self._file, key)
        local_path(source)  # nor has it got another between the two
        self._lead = (0,) if dataset.ndim == 3 else ()
        row_bytes = dataset.shape[-1] * dataset.dtype.itemsize
        self.near_rows = (
            near_rows(row_bytes, source.near_bytes) if dataset.chunks is None else dataset.chunks[-2]
        )  # unpacked whole

    def read_into(self, start: int, out: NDArray) -> None:
        if not len(out):
            return
        try:
            self._dataset.read_direct(out, np.s_[(*self._lead, slice(start, start + len(out)))])
        except OSError as error:
            raise SlideError(
                f"{self._path}: found unreadable rows from {start} on, wanted features; {error}"
            ) from error

    def close(self) -> None:
        self._file.close()
        self._source.close()


def dataset_rows(source: ByteSource, file: h5py.File, key: str, num_rows: int, feature_dim: int) -> RowSource:
    """Rows past the library where they lie in one piece, else through it.

    Raises:
        NeedsWholeFile: they go through it, and the file is not on this machine.
    """
    features = local_dataset(source.name, file, key)
    offset = features.id.get_offset()
    # Big-endian numbers, and small floats that h5py widens, are converted by the library.
    as_stored = features.id.get_type() == h5py.h5t.py_create(features.dtype.newbyteorder("<"))
    if offset is not None and file.userblock_size == 0 and as_stored:
        return RawRows(source, offset, features.dtype, num_rows, feature_dim)
    return Hdf5Rows(source, key)


def check_stored(name: str, key: str, dataset: h5py.Dataset) -> None:
    """A dataset may claim more than was ever written, which HDF5 reads as fill values without end, or hold it in
    chunks so large that reading a few rows unpacks all of them."""
    if dataset.chunks is None:
        found, wanted = dataset.id.get_storage_size(), math.prod(dataset.shape) * dataset.id.get_type().get_size()
        if found < wanted:
            raise SlideError(
                f"{name}: {key}: found {found} of {wanted} bytes, wanted all; the file was not written whole"
            )
        return
    chunk_bytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise SlideError(
            f"{name}: {key}: found chunks of {chunk_bytes >> 20} MiB, wanted at most {MAX_CHUNK_BYTES >> 20}; "
            f"repack it once: h5repack -l {key}:CHUNK=1024x{dataset.shape[-1]} IN OUT"
        )
    wanted = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    found = dataset.id.get_num_chunks()
    if found < wanted:
        raise SlideError(f"{name}: {key}: found {found} of {wanted} chunks, wanted all; the file was not written whole")


def check_small(name: str, key: str, shape: tuple[int, ...]) -> None:
    """A dataset that is read whole may be large where its file is small: it is compressed."""
    if math.prod(shape) * 8 > MAX_UNPACKED:
        raise SlideError(f"{name}: {key}: found shape {shape}, wanted at most {MAX_UNPACKED} bytes")


def has(file: h5py.File, key: str) -> bool:
    """Whether the root has that name, without following a link (`in` and `get` follow it)."""
    return file.id.links.exists(key.encode())


def is_local(file: h5py.File, key: str) -> bool:
    return has(file, key) and file.id.links.get_info(key.encode()).type == h5py.h5l.TYPE_HARD


def local_dataset(name: str, file: h5py.File, key: str) -> h5py.Dataset:
    """The dataset, if it lies in this file: links and external storage could point at any file of the machine."""
    parts = key.split("/")
    for depth in range(1, len(parts) + 1):
        if not is_local(file, "/".join(parts[:depth])):
            raise SlideError(f"{name}: {key}: found a link to elsewhere, wanted a dataset in this file")
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset):
        raise SlideError(f"{name}: {key}: found a {type(dataset).__name__.lower()}, wanted a dataset")
    if dataset.external or dataset.is_virtual:
        raise SlideError(f"{name}: {key}: found data stored in other files, wanted it in this file")
    return dataset


class Hdf5Source:
    """An HDF5 file as a source of named arrays."""

    def __init__(self, access: Hdf5Access, file: h5py.File) -> None:
        self.path, self._access, self._file = Path(access.name), access, file

    def names(self, key: str) -> list[str]:
        """What a group holds; nothing where it is none, or a link."""
        group = self._local(key)
        return sorted(group) if isinstance(group, h5py.Group) else []

    def is_array(self, key: str) -> bool:
        return isinstance(self._local(key), h5py.Dataset)

    def attributes(self, key: str) -> Mapping[str, Any]:
        found = self._local(key)
        return {} if found is None else dict(found.attrs)

    def array(self, key: str) -> Hdf5Array:
        dataset = local_dataset(self._access.name, self._file, key)
        check_stored(self._access.name, key, dataset)
        return Hdf5Array(self._access, key, dataset.shape or (), dataset.dtype.name)

    def _local(self, key: str) -> h5py.Group | h5py.Dataset | None:
        """None: there is nothing, or a link."""
        parts = key.split("/") if key else []
        here = all(is_local(self._file, "/".join(parts[:depth])) for depth in range(1, len(parts) + 1))
        return self._file[key or "/"] if here else None


class Hdf5Array:
    """A small dataset, for whose numbers the file is opened again."""

    def __init__(self, access: Hdf5Access, key: str, shape: tuple[int, ...], dtype: str) -> None:
        self._access, self._key, self.shape, self.dtype = access, key, shape, dtype

    def read(self) -> NDArray:
        check_small(self._access.name, self._key, self.shape)
        return self._access.array(self._key)
