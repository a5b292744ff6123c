"""How the numbers of a zarr array lie in files, out of its metadata in format 2 or 3.

Storage transformers, filters, and codecs that are not known here are refused; `where` is the array, as errors name it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.feature_file import listed, shown

from .zarr_codecs import UNPACKERS

MAX_CHUNK_BYTES = 64 << 20
DTYPES = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "bool")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bfloat16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class Layout:
    """How the numbers of one array lie in files."""

    shape: tuple[int, ...]
    dtype: str
    storage: np.dtype
    chunks: tuple[int, ...]  # what is unpacked at once
    codec: str | None
    shards: tuple[int, ...] | None = None  # what lies in one file, where that is several chunks
    index_first: bool = False  # where a shard has the table of its chunks
    index_bytes: int = 0
    order: str = "C"
    fill: object = 0
    prefix: str = ""  # of a chunk's name
    separator: str = "/"

    @property
    def files(self) -> tuple[int, ...]:
        """Extent of what one file holds."""
        return self.shards or self.chunks

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunks) * self.storage.itemsize


def _refuse(where: str, what: object) -> SlideError:
    known = ", ".join(sorted(UNPACKERS))
    return SlideError(f"{where}: found {what}, wanted plain chunks ({known} or none)")


def layout2(where: str, meta: Mapping[str, Any]) -> Layout:
    if meta.get("filters"):
        raise _refuse(where, "filters")
    if not isinstance(meta["dtype"], str) or meta["dtype"][1:2] not in "iufb":
        raise _refuse(where, "objects or records")
    compressor = meta.get("compressor") or {"id": None}
    storage = np.dtype(meta["dtype"])
    if meta["order"] not in ("C", "F"):
        raise _refuse(where, f"the order {shown(meta['order'])}")
    layout = Layout(
        _sizes(meta["shape"]), storage.name, storage, _sizes(meta["chunks"]), _codec(where, compressor["id"]),
        order=meta["order"], fill=meta.get("fill_value"), separator=_separator(meta, "dimension_separator", "."),
    )  # fmt: skip
    return _checked(where, layout)


def layout3(where: str, meta: Mapping[str, Any]) -> Layout:
    if meta.get("storage_transformers"):
        raise _refuse(where, "storage transformers")
    if meta["chunk_grid"]["name"] != "regular" or meta["data_type"] not in DTYPES:
        raise _refuse(where, f"the type {shown(meta['data_type'])} or an irregular grid")
    encoding = meta["chunk_key_encoding"]
    default = {"default": "/", "v2": "."}[encoding["name"]]
    chunks, codecs = _sizes(meta["chunk_grid"]["configuration"]["chunk_shape"]), meta["codecs"]
    shards, index_first, index_bytes = None, False, 0
    if codecs[0]["name"] == "sharding_indexed":
        shard, shards = codecs[0]["configuration"], chunks
        chunks = _sizes(shard["chunk_shape"])
        if len(codecs) > 1 or any(size % one for size, one in zip(shards, chunks, strict=True)):
            raise _refuse(where, "shards that are packed again or do not hold whole chunks")
        count = math.prod(size // one for size, one in zip(shards, chunks, strict=True))
        index = [codec["name"] for codec in shard["index_codecs"]]
        if index not in (["bytes"], ["bytes", "crc32c"]):
            raise _refuse(where, "a packed index of shards")
        index_first, index_bytes = shard.get("index_location") == "start", 16 * count + 4 * (len(index) - 1)
        codecs = shard["codecs"]
    storage = DTYPES[meta["data_type"]]
    first, *rest = codecs
    if first["name"] != "bytes" or len(rest) > 1:
        raise _refuse(where, f"the codecs {listed(codec['name'] for codec in codecs)}")
    if (first.get("configuration") or {}).get("endian") == "big":
        storage = storage.newbyteorder(">")
    layout = Layout(
        _sizes(meta["shape"]), meta["data_type"], storage, chunks,
        _codec(where, rest[0]["name"]) if rest else None, shards, index_first, index_bytes,
        fill=meta.get("fill_value"), prefix="c" if encoding["name"] == "default" else "",
        separator=_separator(encoding.get("configuration") or {}, "separator", default),
    )  # fmt: skip
    return _checked(where, layout)


def _codec(where: str, name: object) -> str | None:
    if name is not None and name not in UNPACKERS:
        raise _refuse(where, f"the codec {shown(name)}")
    return None if name is None else str(name)


def _checked(where: str, layout: Layout) -> Layout:
    if not len(layout.shape) == len(layout.chunks) == len(layout.files) or 0 in layout.chunks + layout.files:
        raise SlideError(f"{where}: found chunks that do not cut the array's shape, wanted whole ones")
    if layout.chunk_bytes > MAX_CHUNK_BYTES or layout.index_bytes > MAX_CHUNK_BYTES:
        size = max(layout.chunk_bytes, layout.index_bytes) >> 20
        raise SlideError(f"{where}: found chunks of {size} MiB, wanted at most {MAX_CHUNK_BYTES >> 20}")
    return layout


def _sizes(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
        raise ValueError("no whole numbers")
    return tuple(values)


def _separator(meta: Mapping[str, Any], key: str, default: str) -> str:
    separator = meta.get(key, default)
    if separator not in (".", "/"):
        raise ValueError("no separator of chunk names")
    return separator
