"""Feature files of NumPy: `.npy` of one array."""

from __future__ import annotations

import io
import tokenize
from pathlib import Path
from typing import IO

import numpy as np

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.byte_source import ByteSource, read_bytes
from vllm_wsi.slides.feature_file import FeatureFile, check_matrix
from vllm_wsi.slides.identity import SlideIdentity

from .rows import RawRows

MAX_NPY_HEADER = 16 << 10  # bytes; NumPy reads no header of more than 10,000
CONVERT = 'convert it once, where you trust the file: numpy.save("features.npy", numpy.asarray({}, "float32"))'
CONVERT_NPY = CONVERT.format("numpy.load(FILE, allow_pickle=True)")
CONVERT_NPY_DICT = CONVERT.format('numpy.load(FILE, allow_pickle=True).item()["KEY"]')


def open_npy(source: ByteSource, identity: SlideIdentity) -> FeatureFile:
    """Opens an array (N, d) or (1, N, d)."""
    path = source.name
    file = io.BytesIO(read_bytes(source, 0, MAX_NPY_HEADER))
    shape, fortran, dtype = read_npy_header(path, "", file)
    offset = file.tell()
    if dtype.hasobject:
        convert = CONVERT_NPY if shape else CONVERT_NPY_DICT
        raise SlideError(f"{path}: found a pickled Python object, wanted a float array (N, d); {convert}")
    n, d = check_matrix(path, "", shape, dtype.name)
    check_order(path, "", shape, fortran, dtype)
    rows = RawRows(source, offset, dtype, n, d)
    return FeatureFile(path, "npy", "", n, d, dtype.name, rows, identity)


def read_npy_header(path: Path | str, key: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of the array that begins at the file's place, which moves to its numbers."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except (ValueError, SyntaxError, TypeError, tokenize.TokenError, RecursionError, MemoryError) as error:
        where = f"{path}: {key}: found" if key else f"{path}: found"
        raise SlideError(f"{where} a broken npy header, wanted features (N, d); it may be truncated") from error


def check_order(path: Path | str, key: str, shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> None:
    """Raises SlideError unless the numbers lie row by row in little-endian order."""
    where = f"{path}: {key}: found" if key else f"{path}: found"
    if (fortran and sum(size > 1 for size in shape) > 1) or dtype.byteorder == ">":
        raise SlideError(f"{where} Fortran or big-endian order, wanted numpy.ascontiguousarray's little-endian")
