"""Unpacks chunks of zarr arrays into buffers of known size, so that a chunk that claims or holds more is refused.

The zarr library trusts a chunk's own header for the size of what it unpacks; slides come from anywhere.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

EXTRA = "pip install 'vllm-wsi[slides]' to read zarr stores and parquet files"


class BadChunk(ValueError):
    """Bytes that do not unpack to what the array's metadata say; the message says what was found."""


def unpack(codec: str | None, data: bytes, size: int) -> NDArray:
    """uint8 [size] of a packed chunk.

    Raises:
        BadChunk: it holds more or less, or is damaged.
        ImportError: what unpacks it is not installed.
    """
    unpacked = np.frombuffer(data, np.uint8) if codec is None else UNPACKERS[codec](data, size)
    if unpacked.nbytes != size:
        raise BadChunk(f"{unpacked.nbytes} bytes in a chunk of {size}")
    return unpacked


def _zstd(data: bytes, size: int) -> NDArray:
    import pyarrow

    try:
        return np.frombuffer(pyarrow.Codec("zstd").decompress(data, decompressed_size=size, asbytes=True), np.uint8)
    except (OSError, ValueError) as error:
        raise BadChunk(f"zstd data that do not unpack to {size} bytes") from error


def _deflate(data: bytes, size: int) -> NDArray:
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by its header
    try:
        unpacked = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise BadChunk("gzip data that do not unpack") from error
    return np.frombuffer(unpacked, np.uint8)


def _blosc(data: bytes, size: int) -> NDArray:
    from numcodecs import blosc

    return _sized("blosc", blosc.decompress, data, size, claim_at=4)


def _lz4(data: bytes, size: int) -> NDArray:
    from numcodecs import lz4

    return _sized("lz4", lz4.decompress, data, size, claim_at=0)


def _sized(name: str, decompress: Callable, data: bytes, size: int, claim_at: int) -> NDArray:
    """Of codecs whose header says the unpacked size, at that byte."""
    if len(data) < claim_at + 4 or (claim := struct.unpack_from("<I", data, claim_at)[0]) != size:
        raise BadChunk(f"{name} data that are no chunk of {size} bytes")
    out = np.empty(claim, np.uint8)
    try:
        decompress(data, out)
    except (RuntimeError, ValueError) as error:
        raise BadChunk(f"{name} data that do not unpack") from error
    return out


UNPACKERS: Mapping[str, Callable[[bytes, int], NDArray]] = {
    "zstd": _zstd, "gzip": _deflate, "zlib": _deflate, "blosc": _blosc, "lz4": _lz4,
}  # fmt: skip
"""By the names of zarr's codecs, format 2 and 3."""
