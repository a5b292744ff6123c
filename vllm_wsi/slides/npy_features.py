"""Feature files of NumPy: `.npy` of one array."""

from __future__ import annotations

import tokenize
from pathlib import Path

import numpy as np

from .features import FeatureFile, SlideError, SlideIdentity, check_matrix
from .rows import RawRows

CONVERT = 'convert it once, where you trust the file: numpy.save("features.npy", numpy.asarray({}, "float32"))'
CONVERT_NPY = CONVERT.format("numpy.load(FILE, allow_pickle=True)")
CONVERT_NPY_DICT = CONVERT.format('numpy.load(FILE, allow_pickle=True).item()["KEY"]')
CONVERT_NPZ = CONVERT.format('numpy.load(FILE)["KEY"]')


def open_npy(path: Path, identity: SlideIdentity) -> FeatureFile:
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except (ValueError, SyntaxError, tokenize.TokenError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise SlideError(f"{path}: found a broken npy header ({reason}), wanted features (N, d)") from error
        offset = file.tell()
    if dtype.hasobject:
        convert = CONVERT_NPY if shape else CONVERT_NPY_DICT
        raise SlideError(f"{path}: found a pickled Python object, wanted a float array (N, d); {convert}")
    n, d = check_matrix(path, "", shape, dtype.name)
    if fortran or dtype.byteorder == ">":
        raise SlideError(f"{path}: found Fortran or big-endian order, wanted numpy.ascontiguousarray's little-endian")
    rows = RawRows(path, offset, dtype, n, d)
    return FeatureFile(str(path), "npy", "", n, d, dtype.name, rows, identity)
