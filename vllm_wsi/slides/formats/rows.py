"""Row sources: how a range of a feature matrix gets from disk into a buffer."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.feature_file import FLOAT_DTYPES

FLOAT8_STEP = 1 << 20  # numbers that are widened at once
NEAR_BYTES = 32 << 10  # between two rows: reading that many takes about as long as asking twice


def near_rows(row_bytes: int) -> int:
    """How far apart rows of a plain matrix are still read in one piece."""
    return 1 + NEAR_BYTES // max(1, row_bytes)


class RawRows:
    """A row-major matrix that lies uncompressed in a file.

    Read with `pread`: no memory map, whose touched pages would count as this process's memory, and no lock, so
    that a slow disk delays the reader of its own slide alone.
    """

    def __init__(self, path: Path, offset: int, dtype: np.dtype, num_rows: int, feature_dim: int) -> None:
        self._row_bytes = dtype.itemsize * feature_dim
        self.near_rows = near_rows(self._row_bytes)
        self._path, self._offset = path, offset
        self._file = open(path, "rb", buffering=0)  # a file object: garbage collection closes it too
        size = os.fstat(self._file.fileno()).st_size
        wanted = offset + num_rows * self._row_bytes
        if size < wanted:
            self._file.close()
            raise SlideError(f"{path}: found {size} bytes, wanted {wanted} by its own header; the file is truncated")

    def read_into(self, start: int, out: NDArray) -> None:
        if not out.flags.c_contiguous:
            raise ValueError(f"{self._path}: the buffer's rows are not contiguous")
        view = memoryview(out.view(np.uint8).reshape(-1).data) if out.size else memoryview(b"")
        offset = self._offset + start * self._row_bytes
        while view:
            got = os.preadv(self._file.fileno(), [view], offset)
            if got == 0:
                raise SlideError(f"{self._path}: found the end of the file while reading rows; it was truncated")
            view, offset = view[got:], offset + got

    def close(self) -> None:
        self._file.close()


class ArrayRows:
    """A matrix in memory."""

    near_rows = 1 << 10

    def __init__(self, array: NDArray) -> None:
        self._array = array

    def read_into(self, start: int, out: NDArray) -> None:
        out[:] = self._array[start : start + len(out)]

    def close(self) -> None:
        pass


class Float8Rows:
    """A matrix of 8-bit floats that lies uncompressed in a file, widened to float16, which holds each of them exactly
    (HDF5's library widens them the same way)."""

    def __init__(self, path: Path, offset: int, dtype: str, num_rows: int, feature_dim: int) -> None:
        self._values, self._d = FLOAT8[dtype](), feature_dim
        self._raw = RawRows(path, offset, np.dtype(np.uint8), num_rows, feature_dim)
        self.near_rows = self._raw.near_rows

    def read_into(self, start: int, out: NDArray) -> None:
        step = max(1, FLOAT8_STEP // self._d)
        buffer = np.empty((min(step, len(out)), self._d), np.uint8)
        for first in range(0, len(out), step):
            part = out[first : first + step]
            self._raw.read_into(start + first, buffer[: len(part)])
            part[:] = self._values[buffer[: len(part)]]

    def close(self) -> None:
        self._raw.close()


def _e5m2() -> NDArray:
    """float8_e5m2 is the upper half of a float16."""
    return (np.arange(256, dtype=np.uint16) << 8).view(np.float16)


def _e4m3fn() -> NDArray:
    """Four bits of exponent with bias 7, no infinity, one NaN for each sign."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    value = np.where(code & 127 == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float16)


FLOAT8 = {"float8_e4m3fn": _e4m3fn, "float8_e5m2": _e5m2}
"""8-bit floats by torch's names, and what makes the float16 value of each of their 256 codes."""


def stored_rows(path: Path, offset: int, dtype: str, num_rows: int, feature_dim: int) -> RawRows | Float8Rows:
    """Rows that lie uncompressed in a file; `dtype`: a key of FLOAT_DTYPES or FLOAT8."""
    if dtype in FLOAT8:
        return Float8Rows(path, offset, dtype, num_rows, feature_dim)
    return RawRows(path, offset, FLOAT_DTYPES[dtype], num_rows, feature_dim)


def read_as(dtype: str) -> str:
    """The dtype in which rows stored as `dtype` are read."""
    return "float16" if dtype in FLOAT8 else dtype


def widened(key: str, dtype: str) -> tuple[str, ...]:
    """What `doctor` says of 8-bit floats."""
    return (f"{key or 'features'}: stored as {dtype}, read as float16",) if dtype in FLOAT8 else ()


def stored_array(path: Path, key: str, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray:
    """A small array that lies uncompressed in a file. Raises SlideError where the file ends before it."""
    count = math.prod(shape)
    found = max(0, os.stat(path).st_size - offset) // dtype.itemsize
    array = np.fromfile(path, dtype, min(count, found), offset=offset)
    if array.size < count:
        raise SlideError(f"{path}: {key}: found {array.size} numbers, wanted {count}; the file is truncated")
    return array.reshape(shape)
