"""safetensors feature files: features, coordinates and a string map of metadata."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.byte_source import ByteSource, read_bytes
from vllm_wsi.slides.feature_file import FLOAT_DTYPES, FeatureFile, check_matrix, metadata_strings
from vllm_wsi.slides.identity import SlideIdentity
from vllm_wsi.slides.units import KEPT_UNIT, coord_unit, kept_unit, unit_remarks

from .named_arrays import AXES, COORD_KEYS, Array, Coords, features_key, find_places
from .rows import FLOAT8, read_as, stored_array, stored_rows, widened

MAX_SAFETENSORS_HEADER = 1 << 20  # bytes; two tensors and their metadata need a few hundred
SAFETENSORS_DTYPES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip

OWN_COORDS = "coords"  # of our own files, which hold level-0 pixels where they name no unit
COORD_NAMES = (*COORD_KEYS, *(name for pair in AXES for name in pair))
COORD_DTYPES = {
    "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


def open_safetensors(source: ByteSource, identity: SlideIdentity) -> FeatureFile:
    # The header is parsed here because the library offers no byte offsets, and its own reader maps the file.
    path = source.name
    size = struct.unpack("<Q", read_bytes(source, 0, 8))[0]
    if size > MAX_SAFETENSORS_HEADER:
        raise SlideError(f"{path}: found a header of {size} bytes, wanted at most {MAX_SAFETENSORS_HEADER}")
    raw = read_bytes(source, 8, size)
    if len(raw) < size:
        raise SlideError(f"{path}: found {source.size} bytes, wanted a header of {size}; the file is truncated")
    try:
        header = json.loads(raw)
        metadata = metadata_strings(path, header.pop("__metadata__", {}))
        key = features_key(path, header)
        entry = header[key]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])
        shape, (begin, end) = whole_numbers(entry["shape"]), whole_numbers(entry["data_offsets"])
        n, d = check_matrix(path, key, shape, read_as(dtype))
        data = 8 + size
        if begin < 0 or end - begin != n * d * (1 if dtype in FLOAT8 else FLOAT_DTYPES[dtype].itemsize):
            raise SlideError(f"{path}: {key}: found offsets {begin}:{end}, wanted the size of shape {shape}")
        arrays = {name: _array(source, name, header[name], data) for name in COORD_NAMES if name in header}
    except SlideError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SlideError(f"{path}: found a broken safetensors header, wanted JSON with offsets") from error
    coords = _coords(path, arrays, n, metadata)
    rows = stored_rows(source, data + begin, dtype, n, d)
    return FeatureFile(
        path, "safetensors", key, n, d, read_as(dtype), rows, identity, metadata,
        **coords.fields(), remarks=(*coords.remarks, *widened(key, dtype)),
    )  # fmt: skip


def whole_numbers(values: object) -> tuple[int, ...]:
    """A JSON list of whole numbers; 40.0 and true are none."""
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ValueError(f"found {values!r}, wanted whole numbers")
    return tuple(values)


def _coords(path: str, arrays: Mapping[str, Array], num_patches: int, metadata: Mapping[str, str]) -> Coords:
    found = find_places(path, arrays, num_patches)
    if found is None:
        return Coords()
    if KEPT_UNIT in metadata:
        unit = kept_unit(path, metadata)
    else:
        unit = coord_unit(path, metadata, False, found.key == OWN_COORDS, found.sample())
    return Coords(unit, found.load, tuple(unit_remarks(unit)))


def _array(source: ByteSource, name: str, entry: Mapping, data: int) -> Array:
    """An entry of the header; one that cannot be coordinates keeps safetensors' name of its dtype, for the error."""
    shape, (begin, end) = whole_numbers(entry["shape"]), whole_numbers(entry["data_offsets"])
    if entry["dtype"] not in COORD_DTYPES:
        return Array(shape, str(entry["dtype"]), lambda: np.empty(0))
    dtype, count = np.dtype(COORD_DTYPES[entry["dtype"]]), math.prod(shape)
    if begin < 0 or min(shape, default=0) < 0 or end - begin != count * dtype.itemsize:
        raise SlideError(f"{source.name}: {name}: found offsets {begin}:{end}, wanted the size of shape {shape}")

    def first(numbers: int) -> NDArray:
        return stored_array(source, name, data + begin, dtype, (min(numbers, count),))

    return Array(shape, dtype.name, lambda: first(count).reshape(shape), first)
