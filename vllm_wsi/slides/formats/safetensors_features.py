"""safetensors feature files: `features`, `coords` and a string map of metadata."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.byte_source import ByteSource, read_bytes
from vllm_wsi.slides.feature_file import FLOAT_DTYPES, FeatureFile, check_matrix, metadata_strings
from vllm_wsi.slides.identity import SlideIdentity
from vllm_wsi.slides.units import GRID_SAMPLE, KEPT_UNIT, coord_unit, kept_unit, unit_fields, unit_remarks

from .named_arrays import features_key
from .rows import FLOAT8, read_as, stored_array, stored_rows, widened

MAX_SAFETENSORS_HEADER = 1 << 20  # bytes; two tensors and their metadata need a few hundred
SAFETENSORS_DTYPES = {
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip

COORD_DTYPES = {
    "I16": "<i2", "I32": "<i4", "I64": "<i8", "U16": "<u2", "U32": "<u4", "U64": "<u8", "F16": "<f2", "F32": "<f4",
    "F64": "<f8",
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
        load_coords = _safetensors_coords(source, header.get("coords"), data, n)
    except SlideError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SlideError(f"{path}: found a broken safetensors header, wanted JSON with offsets") from error
    rows = stored_rows(source, data + begin, dtype, n, d)
    unit = None
    remarks = [*widened(key, dtype)]
    if load_coords is not None:
        if KEPT_UNIT in metadata:
            unit = kept_unit(path, metadata)
        else:
            unit = coord_unit(path, metadata, False, True, load_coords(GRID_SAMPLE))
        remarks += unit_remarks(unit)
    return FeatureFile(
        path, "safetensors", key, n, d, read_as(dtype), rows, identity, metadata,
        **unit_fields(unit), load_coords=load_coords, remarks=tuple(remarks),
    )  # fmt: skip


def whole_numbers(values: object) -> tuple[int, ...]:
    """A JSON list of whole numbers; 40.0 and true are none."""
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ValueError(f"found {values!r}, wanted whole numbers")
    return tuple(values)


def _safetensors_coords(
    source: ByteSource, entry: Mapping | None, data: int, num_patches: int
) -> Callable[..., NDArray] | None:
    if entry is None:
        return None
    shape, (begin, end) = whole_numbers(entry["shape"]), whole_numbers(entry["data_offsets"])
    if shape == (1, num_patches, 2):
        shape = shape[1:]
    if shape != (num_patches, 2) or entry["dtype"] not in COORD_DTYPES:
        raise SlideError(
            f"{source.name}: coords: found {entry['dtype']} of shape {shape}, "
            f"wanted numbers of shape ({num_patches}, 2)"
        )
    dtype, count = np.dtype(COORD_DTYPES[entry["dtype"]]), num_patches * 2
    if begin < 0 or end - begin != count * dtype.itemsize:
        raise SlideError(f"{source.name}: coords: found offsets {begin}:{end}, wanted the size of shape {shape}")

    def load(rows: int = num_patches) -> NDArray:
        return stored_array(source, "coords", data + begin, dtype, (min(rows, num_patches), 2))

    return load
