"""Row sources: how a range of a feature matrix gets from disk into a buffer."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .features import SlideError


class RawRows:
    """A row-major matrix that lies uncompressed in a file.

    Read with `pread`: no memory map, whose touched pages would count as this process's memory, and no lock, so
    that a slow disk delays the reader of its own slide alone.
    """

    def __init__(self, path: Path, offset: int, dtype: np.dtype, num_rows: int, feature_dim: int) -> None:
        self._row_bytes = dtype.itemsize * feature_dim
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

    def __init__(self, array: NDArray) -> None:
        self._array = array

    def read_into(self, start: int, out: NDArray) -> None:
        out[:] = self._array[start : start + len(out)]

    def close(self) -> None:
        pass
