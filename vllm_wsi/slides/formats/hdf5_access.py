"""An HDF5 file through its library: one that lies elsewhere too, and one whose bytes would never let the library go.

The library has one lock for all files of a process, so it may neither wait for a network nor run on for ever.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError, WsiError
from vllm_wsi.slides.byte_source import ByteSource, LocalBytes, NeedsWholeFile, read_bytes

T = TypeVar("T")
PIECE_BYTES = 256 << 10
MAX_PIECES = 256  # 64 MiB of metadata and coordinates
HEAP_MAGIC = b"GCOL"
HEAP_ALIGNMENT = 8


class Hdf5Access:
    """Opens a file for the time of one use of it."""

    def __init__(self, source: ByteSource) -> None:
        self.source, self.name = source, source.name
        self._pieces = None if isinstance(source, LocalBytes) else _Pieces(source)

    def use(self, action: Callable[[h5py.File], T]) -> T:
        """What `action` makes of the open file.

        A file that lies elsewhere is read from pieces that are here: where one is missing, the reading fails, the piece
        is fetched, and `action` is tried anew.

        Raises:
            NeedsWholeFile: it needs more pieces than `MAX_PIECES`.
        """
        if self._pieces is None:
            with h5py.File(_Whole(self.source), "r") as file:
                return action(file)
        while True:
            try:
                with h5py.File(self._pieces, "r") as file:
                    done = action(file)
                if not self._pieces.missing:
                    return done
            except Exception:
                if not self._pieces.missing:
                    raise
            self._pieces.fetch()

    def array(self, key: str) -> NDArray:
        """All numbers of a dataset.

        Raises:
            NeedsWholeFile: as `use`.
        """
        try:
            return self.use(lambda file: np.asarray(file[key][()]))
        except WsiError:
            raise
        except (OSError, KeyError, ValueError) as error:
            raise SlideError(f"{self.name}: {key}: found unreadable data, wanted numbers; {error}") from error


class _FileObject(io.RawIOBase):
    """A source as h5py reads a file. What the library would run through for ever is an error."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._at = source, 0
        self._length_size: int | None = None  # bytes of a length within this file; None: not looked up yet

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self._source.size)
        if end <= self._at:
            return 0
        found = self._bytes(self._at, end)
        if found[:4] == HEAP_MAGIC:
            if self._length_size is None:
                self._length_size = _length_size(self._bytes(0, min(64, self._source.size)))
            check_heap(found, self._length_size)
        buffer[: len(found)] = found
        self._at = end
        return len(found)

    def _bytes(self, begin: int, end: int) -> bytes:
        raise NotImplementedError


class _Whole(_FileObject):
    """A file of this machine."""

    def _bytes(self, begin: int, end: int) -> bytes:
        return read_bytes(self._source, begin, end - begin)


class _Pieces(_FileObject):
    """A file of which some pieces are here; what is asked for and is not here is noted."""

    def __init__(self, source: ByteSource) -> None:
        super().__init__(source)
        self._here: dict[int, bytes] = {}
        self.missing: set[int] = set()

    def fetch(self) -> None:
        if len(self._here) + len(self.missing) > MAX_PIECES:
            raise NeedsWholeFile(self._source.name)
        for number in sorted(self.missing):
            self._here[number] = read_bytes(self._source, number * PIECE_BYTES, PIECE_BYTES)
        self.missing.clear()

    def _bytes(self, begin: int, end: int) -> bytes:
        numbers = range(begin // PIECE_BYTES, (end - 1) // PIECE_BYTES + 1)
        if missing := {number for number in numbers if number not in self._here}:
            self.missing |= missing
            raise OSError("a piece of the file is not here yet")
        joined = b"".join(self._here[number] for number in numbers)
        offset = begin - numbers.start * PIECE_BYTES
        return joined[offset : offset + end - begin]


def check_heap(heap: bytes, length_size: int) -> None:
    """A collection of the global heap, where HDF5 keeps strings of any length, or its beginning.

    HDF5 2.0 walks from object to object by their sizes, and stays for ever at one of size 0 (File Format
    Specification, III.E; `H5HGcache.c`).

    Args:
        length_size: bytes of a length within the file.

    Raises:
        OSError: an object is smaller than its own header, or ends beyond the collection.
    """
    header = _aligned(8 + length_size)
    size = int.from_bytes(heap[8 : 8 + length_size], "little")
    at = header
    while at + header <= min(size, len(heap)):  # an object's header is as long as the collection's
        (index,) = struct.unpack_from("<H", heap, at)
        length = int.from_bytes(heap[at + 8 : at + 8 + length_size], "little")
        taken = header + _aligned(length) if index else length  # free space counts its header
        if taken < header or at + taken > size:
            raise OSError(f"found an object of {length} bytes in a heap of {size}, wanted one that fits")
        at += taken


def _aligned(size: int) -> int:
    return -(-size // HEAP_ALIGNMENT) * HEAP_ALIGNMENT


def _length_size(superblock: bytes) -> int:
    """Of versions 0 and 1 at byte 14, of 2 and 3 at byte 10."""
    found = superblock[14 if superblock[8] < 2 else 10]
    return found if found in (2, 4, 8, 16, 32) else 8
