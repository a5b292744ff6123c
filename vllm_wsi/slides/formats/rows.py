"""Row sources: how a range of a feature matrix gets from disk into a buffer."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.byte_source import ByteSource
from vllm_wsi.slides.feature_file import FLOAT_DTYPES

FLOAT8_STEP = 1 << 20  # numbers that are widened at once


def near_rows(row_bytes: int, near_bytes: int) -> int:
    """How far apart rows of a plain matrix are still read in one piece."""
    return 1 + near_bytes // max(1, row_bytes)


class RawRows:
    """A row-major matrix that lies uncompressed in a file, which it closes."""

    def __init__(self, source: ByteSource, offset: int, dtype: np.dtype, num_rows: int, feature_dim: int) -> None:
        self._row_bytes = dtype.itemsize * feature_dim
        self.near_rows = near_rows(self._row_bytes, source.near_bytes)
        self.source, self._offset = source, offset
        wanted = offset + num_rows * self._row_bytes
        if source.size < wanted:
            raise SlideError(
                f"{source.name}: found {source.size} bytes, wanted {wanted} by its own header; the file is truncated"
            )

    def read_into(self, start: int, out: NDArray) -> None:
        if not out.flags.c_contiguous:
            raise ValueError(f"{self.source.name}: the buffer's rows are not contiguous")
        if out.size:
            self.source.read_into(self._offset + start * self._row_bytes, out.view(np.uint8).reshape(-1).data)

    def close(self) -> None:
        self.source.close()


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

    def __init__(self, source: ByteSource, offset: int, dtype: str, num_rows: int, feature_dim: int) -> None:
        self._values, self._d = FLOAT8[dtype](), feature_dim
        self._raw = RawRows(source, offset, np.dtype(np.uint8), num_rows, feature_dim)
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


def stored_rows(source: ByteSource, offset: int, dtype: str, num_rows: int, feature_dim: int) -> RawRows | Float8Rows:
    """Rows that lie uncompressed in a file; `dtype`: a key of FLOAT_DTYPES or FLOAT8."""
    if dtype in FLOAT8:
        return Float8Rows(source, offset, dtype, num_rows, feature_dim)
    return RawRows(source, offset, FLOAT_DTYPES[dtype], num_rows, feature_dim)


def read_as(dtype: str) -> str:
    """The dtype in which rows stored as `dtype` are read."""
    return "float16" if dtype in FLOAT8 else dtype


def widened(key: str, dtype: str) -> tuple[str, ...]:
    """What `doctor` says of 8-bit floats."""
    return (f"{key or 'features'}: stored as {dtype}, read as float16",) if dtype in FLOAT8 else ()


def stored_array(source: ByteSource, key: str, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray:
    """A small array that lies uncompressed in a file. Raises SlideError where the file ends before it."""
    count = math.prod(shape)
    found = max(0, source.size - offset) // dtype.itemsize
    if found < count:
        raise SlideError(f"{source.name}: {key}: found {found} numbers, wanted {count}; the file is truncated")
    array = np.empty(count, dtype)
    if count:
        source.read_into(offset, array.view(np.uint8).data)
    return array.reshape(shape)
