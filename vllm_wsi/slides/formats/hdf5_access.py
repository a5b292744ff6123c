"""An HDF5 file through its library, wherever the file lies; the library itself never waits for a network."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError, WsiError
from vllm_wsi.slides.byte_source import ByteSource, LocalBytes, NeedsWholeFile, local_path, read_bytes

T = TypeVar("T")
PIECE_BYTES = 256 << 10
MAX_PIECES = 256  # 64 MiB of metadata and coordinates


class Hdf5Access:
    """Opens a file for the time of one use of it."""

    def __init__(self, source: ByteSource) -> None:
        self.source, self.name = source, source.name
        self._pieces = None if isinstance(source, LocalBytes) else _Pieces(source)

    def use(self, action: Callable[[h5py.File], T]) -> T:
        """What `action` makes of the open file.

        The library has one lock for all files. So a remote file is read from pieces that are here: where one is
        missing, the reading fails, the piece is fetched, and `action` is tried anew.

        Raises:
            NeedsWholeFile: it needs more pieces than `MAX_PIECES`.
        """
        if self._pieces is None:
            with h5py.File(local_path(self.source), "r", locking=False) as file:
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


class _Pieces(io.RawIOBase):
    """A file of which some pieces are here; what is asked for and is not here is noted."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._at = source, 0
        self._here: dict[int, bytes] = {}
        self.missing: set[int] = set()

    def fetch(self) -> None:
        if len(self._here) + len(self.missing) > MAX_PIECES:
            raise NeedsWholeFile(self._source.name)
        for number in sorted(self.missing):
            self._here[number] = read_bytes(self._source, number * PIECE_BYTES, PIECE_BYTES)
        self.missing.clear()

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
        begin, end = self._at, min(self._at + len(buffer), self._source.size)
        if end <= begin:
            return 0
        numbers = range(begin // PIECE_BYTES, (end - 1) // PIECE_BYTES + 1)
        if missing := {number for number in numbers if number not in self._here}:
            self.missing |= missing
            raise OSError("a piece of the file is not here yet")
        joined = b"".join(self._here[number] for number in numbers)
        offset = begin - numbers.start * PIECE_BYTES
        buffer[: end - begin] = joined[offset : offset + end - begin]
        self._at = end
        return end - begin
