"""The bytes of a file by range, wherever the file lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from vllm_wsi.errors import SlideError

NEAR_BYTES = 32 << 10  # of a local file: reading that many takes about as long as asking twice


class ByteSource(Protocol):
    """A file that is read by ranges; its readers close it."""

    name: str  # as errors name it
    size: int  # bytes
    near_bytes: int  # what lies between two ranges no further apart than this is read along with them

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fills `out` (of bytes) with what begins at `offset`.

        Raises:
            SlideError: the file ends before that.
        """

    def close(self) -> None: ...


class LocalBytes:
    """A file of this machine.

    Read with `pread`: no memory map, whose touched pages would count as this process's memory, and no lock, so that a
    slow disk delays the reader of its own slide alone.
    """

    near_bytes = NEAR_BYTES

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._file = open(path, "rb", buffering=0)  # a file object: garbage collection closes it too
        self.size = os.fstat(self._file.fileno()).st_size

    def read_into(self, offset: int, out: memoryview) -> None:
        while out:
            got = os.preadv(self._file.fileno(), [out], offset)
            if got == 0:
                raise SlideError(
                    f"{self.name}: found its end at byte {offset}, wanted {len(out)} more; it is truncated"
                )
            out, offset = out[got:], offset + got

    def has_its_name(self) -> bool:
        """Whether the open file is still the one of that name."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError:
            return False

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LocalBytes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NeedsWholeFile(Exception):
    """A format, or a way in which this file has it, that is read from a file of this machine alone."""


def local_path(source: ByteSource) -> Path:
    """Where the file lies on this machine, for a library that opens it by its name.

    Raises:
        NeedsWholeFile: it lies elsewhere.
        SlideError: another file has its name by now.
    """
    if not isinstance(source, LocalBytes):
        raise NeedsWholeFile(source.name)
    if not source.has_its_name():
        raise SlideError(f"{source.name}: found another file under its name, wanted the one that was opened")
    return source.path


def read_bytes(source: ByteSource, offset: int, size: int) -> bytes:
    """At most `size` bytes from `offset` on: fewer where the file ends before."""
    out = bytearray(max(0, min(size, source.size - offset)))
    source.read_into(offset, memoryview(out))
    return bytes(out)
