"""Arrays of a zarr store on disk (formats 2 and 3), in bounded memory, from files of that store alone.

Read is what each array's own metadata say; the root's consolidated copies of them are ignored.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.feature_file import shown
from vllm_wsi.slides.identity import MAX_STORE_FILES

from .zarr_codecs import EXTRA, BadChunk, unpack
from .zarr_layout import Layout, layout2, layout3

MAX_METADATA_FILE = 8 << 20  # bytes; the root's may hold a copy of all others
MAX_UNPACKED = 64 << 20  # bytes of an array that is read whole
NEVER_WRITTEN = 2**64 - 1  # offset and length of a chunk that is not in its shard
NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as JSON names these fill values
PACKED_SLACK = 1 << 16  # what packing may add to a chunk that does not shrink


class ZarrStore:
    """A directory of groups and arrays, named by their paths in it ("" is the root)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self, key: str = "") -> list[str]:
        """Groups and arrays in a group."""
        folder = self._folder(key)
        if not folder.is_dir():
            return []
        return sorted(child.name for child in folder.iterdir() if child.is_dir() and self._kind(child))

    def has(self, key: str) -> bool:
        return self._kind(self._folder(key)) is not None

    def is_array(self, key: str) -> bool:
        return self._kind(self._folder(key)) == "array"

    def attributes(self, key: str = "") -> Mapping[str, Any]:
        folder = self._folder(key)
        if (folder / "zarr.json").is_file():
            found = self._json(folder / "zarr.json").get("attributes", {})
        else:
            found = self._json(folder / ".zattrs") if (folder / ".zattrs").is_file() else {}
        if not isinstance(found, dict):
            raise SlideError(f"{self.path}: {key}: found attributes that are no object, wanted zarr metadata")
        return found

    def array(self, key: str) -> ZarrArray:
        """Raises SlideError where it is no array, or one that is not read here."""
        folder = self._folder(key)
        if self._kind(folder) != "array":
            raise SlideError(f"{self.path}: {key}: found no array, wanted one")
        try:
            if (folder / "zarr.json").is_file():
                layout = layout3(f"{self.path}: {key}", self._json(folder / "zarr.json"))
            else:
                layout = layout2(f"{self.path}: {key}", self._json(folder / ".zarray"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, SlideError):
                raise
            raise SlideError(f"{self.path}: {key}: found broken metadata, wanted a zarr array") from error
        return ZarrArray(self, key, layout)

    def _folder(self, key: str) -> Path:
        return self.path / key if key else self.path

    def _kind(self, folder: Path) -> str | None:
        if (folder / ".zarray").is_file():
            return "array"
        if (folder / ".zgroup").is_file():
            return "group"
        if (folder / "zarr.json").is_file():
            return str(self._json(folder / "zarr.json").get("node_type"))
        return None

    def _json(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.path).as_posix()
        with open(path, "rb") as file:
            raw = file.read(MAX_METADATA_FILE + 1)
        if len(raw) > MAX_METADATA_FILE:
            raise SlideError(f"{self.path}: {name}: found more than {MAX_METADATA_FILE} bytes, wanted zarr metadata")
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise SlideError(f"{self.path}: {name}: found broken JSON, wanted zarr metadata") from error
        if not isinstance(value, dict):
            raise SlideError(f"{self.path}: {name}: found no object, wanted zarr metadata")
        return value


class ZarrArray:
    """One array; its chunks are unpacked as they are asked for."""

    def __init__(self, store: ZarrStore, key: str, layout: Layout) -> None:
        self._store, self._key, self._layout = store, key, layout
        self.shape, self.dtype = layout.shape, layout.dtype
        self.near_rows = layout.chunks[-2] if len(layout.chunks) > 1 else 1  # a chunk is unpacked whole

    def check_whole(self) -> None:
        """Raises SlideError where a chunk was never written, which zarr reads as fill values, or a shard is cut."""
        counts = [-(-size // one) for size, one in zip(self.shape, self._layout.files, strict=True)]
        wanted, found = math.prod(counts), 0
        if wanted <= MAX_STORE_FILES:  # there are no more files in a store
            places = itertools.product(*map(range, counts))
            if self._layout.shards is None:
                found = sum(self._file(place).is_file() for place in places)
            else:
                found, wanted = map(sum, zip(*map(self._written, places), strict=True))
        if found < wanted:
            raise SlideError(
                f"{self._store.path}: {self._key}: found {found} of {wanted} chunks, wanted all; "
                "the store was not written whole"
            )

    def _written(self, place: tuple[int, ...]) -> tuple[int, int]:
        """(chunks of a shard that were written, all of them), of those that lie within the array."""
        shards, chunks = self._layout.files, self._layout.chunks
        ends = [min(one, size - at * one) for at, one, size in zip(place, shards, self.shape, strict=True)]
        counts = [-(-end // one) for end, one in zip(ends, chunks, strict=True)]
        try:
            table = self._shard_table(self._file(place))
        except BadChunk as error:
            raise self._refusal(error, place) from error
        if table is None:
            return 0, math.prod(counts)
        return int((table[tuple(map(slice, counts))] != NEVER_WRITTEN).any(axis=-1).sum()), math.prod(counts)

    def read(self) -> NDArray:
        """The whole array, if it is small."""
        size = math.prod(self.shape) * self._layout.storage.itemsize
        if size > MAX_UNPACKED:
            raise SlideError(
                f"{self._store.path}: {self._key}: found {size} bytes, wanted at most {MAX_UNPACKED} beside features"
            )
        out = np.empty(self.shape, self._layout.storage.newbyteorder("="))
        self._fill(out, tuple(slice(0, size) for size in self.shape))
        return out

    def read_into(self, start: int, out: NDArray) -> None:
        """Rows start .. of a matrix (N, d) or (1, N, d)."""
        if len(out):
            lead = (slice(0, 1),) if len(self.shape) == 3 else ()
            where = (*lead, slice(start, start + len(out)), slice(0, self.shape[-1]))
            self._fill(out[None] if lead else out, where)

    def close(self) -> None:
        """Each chunk's file is closed when it is read."""

    def _fill(self, out: NDArray, where: tuple[slice, ...]) -> None:
        chunks = self._layout.chunks
        axes = [range(s.start // one, -(-s.stop // one)) for s, one in zip(where, chunks, strict=True)]
        for place in itertools.product(*axes):
            into, of = [], []
            for number, one, wanted in zip(place, chunks, where, strict=True):
                begin, end = max(number * one, wanted.start), min((number + 1) * one, wanted.stop)
                into.append(slice(begin - wanted.start, end - wanted.start))
                of.append(slice(begin - number * one, end - number * one))
            out[tuple(into)] = self._chunk(place)[tuple(of)]

    def _chunk(self, place: tuple[int, ...]) -> NDArray:
        layout = self._layout
        try:
            packed = self._packed(place)
            if packed is None:
                return self._filled()
            numbers = unpack(layout.codec, packed, layout.chunk_bytes).view(layout.storage)
        except BadChunk as error:
            raise self._refusal(error, place) from error
        except ImportError as error:
            raise SlideError(
                f"{self._store.path}: {self._key}: found {layout.codec} chunks but no {error.name}; {EXTRA}"
            ) from error
        return numbers.reshape(layout.chunks, order="F" if layout.order == "F" else "C")

    def _refusal(self, error: BadChunk, place: tuple[int, ...]) -> SlideError:
        return SlideError(f"{self._store.path}: {self._key}: found {error} at {list(place)}, wanted whole chunks")

    def _packed(self, place: tuple[int, ...]) -> bytes | None:
        """A chunk's bytes as they lie on disk; None: it was never written."""
        layout = self._layout
        most = layout.chunk_bytes + layout.chunk_bytes // 8 + PACKED_SLACK
        if layout.shards is None:
            return self._bytes(self._file(place), 0, most)
        inside = [size // one for size, one in zip(layout.shards, layout.chunks, strict=True)]
        file = self._file(tuple(number // count for number, count in zip(place, inside, strict=True)))
        if (table := self._shard_table(file)) is None:
            return None
        offset, length = map(int, table[tuple(number % count for number, count in zip(place, inside, strict=True))])
        if offset == length == NEVER_WRITTEN:
            return None
        size = file.stat().st_size
        if length > most or offset + length > size:
            raise BadChunk(f"a chunk of {length} bytes in a shard of {size}")
        return self._bytes(file, offset, length, exact=True)

    def _shard_table(self, file: Path) -> NDArray[np.uint64] | None:
        """(offset, length) of each chunk in a shard, as an array [.., 2] of the shard's extent in chunks."""
        layout = self._layout
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            return None
        if size < layout.index_bytes:
            raise BadChunk("a shard without its index")
        start = 0 if layout.index_first else size - layout.index_bytes
        inside = [size // one for size, one in zip(layout.files, layout.chunks, strict=True)]
        table = self._bytes(file, start, layout.index_bytes, exact=True)
        return None if table is None else np.frombuffer(table, "<u8", math.prod(inside) * 2).reshape(*inside, 2)

    def _bytes(self, file: Path, offset: int, most: int, exact: bool = False) -> bytes | None:
        try:
            handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadChunk(f"an unreadable file ({error.strerror})") from error
        with open(handle, "rb") as opened:
            size = most if exact else os.fstat(handle).st_size
            if size > most:
                raise BadChunk(f"{size} packed bytes where {most} can be")
            opened.seek(offset)
            data = opened.read(size)
        if len(data) < size:
            raise BadChunk(f"{len(data)} of {size} packed bytes")
        return data

    def _file(self, place: tuple[int, ...]) -> Path:
        layout = self._layout
        parts = [layout.prefix] if layout.prefix else []
        parts += map(str, place)
        return self._store.path / self._key / (layout.separator.join(parts) or "0")

    def _filled(self) -> NDArray:
        """A chunk that was never written, as the array's metadata say that it is read."""
        fill = self._layout.fill
        if fill in NOT_FINITE:
            fill = float(str(fill))
        try:
            if not isinstance(fill, (int, float, NoneType)):
                raise TypeError
            return np.full(self._layout.chunks, np.array(fill or 0, self._layout.storage))
        except (TypeError, ValueError, OverflowError) as error:  # no number, or none of this dtype
            raise BadChunk(f"no chunk and the fill_value {shown(fill)}") from error
