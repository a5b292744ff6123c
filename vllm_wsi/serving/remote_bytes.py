"""The bytes of a file on another machine: by several ranged requests at once, and the next stretch ahead of its use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from vllm_wsi.errors import FetchError, SlideError

PART_BYTES = 2 << 20  # of one request
AT_ONCE = 4  # requests for one slide
NEAR_BYTES = 256 << 10  # take about as long as another request
PAUSE_SECONDS = 0.1  # before the second try; then twice as long each time
SLOWEST = 10  # times the time of a part, for a whole slide


class Interrupted(Exception):
    """A transfer that broke before a byte came, and is worth another try; says why."""


class RangesUnfit(FetchError):
    """What came is not the range that was asked for, is of another state of the file, or does not come by ranges."""


class RangeTransport(Protocol):
    """One state of a file on another machine, by ranges."""

    def fetch(self, offset: int, out: memoryview, seconds: float) -> int:
        """Fills the front of `out`, all of it unless the transfer breaks, with the bytes from `offset` on.

        Returns:
            How many bytes came.

        Raises:
            Interrupted: none came, and another try is worth it.
            RangesUnfit: something else came.
            FetchError: the file cannot be had.
        """


class RemoteBytes:
    """A `ByteSource` on another machine. One thread reads it.

    Args:
        name: as errors name it.
        size: of the file, in bytes.
        seconds: in which each part of `PART_BYTES` must come, its tries included.
        tries: of each part, in a row, without a byte.
    """

    near_bytes = NEAR_BYTES

    def __init__(self, name: str, size: int, transport: RangeTransport, seconds: float, tries: int) -> None:
        self.name, self.size = name, size
        self._transport, self._seconds, self._tries = transport, seconds, tries
        self._deadline = time.monotonic() + SLOWEST * seconds
        self._ahead: _Stretch | None = None
        self._block = 0, bytearray()

    def read_into(self, offset: int, out: memoryview) -> None:
        end = offset + len(out)
        if end > self.size:
            raise SlideError(f"{self.name}: found its end at byte {self.size}, wanted bytes {offset} to {end}")
        begin, block = self._block
        if begin <= offset and end <= begin + len(block):
            out[:] = memoryview(block)[offset - begin : end - begin]
            return
        if len(out) < NEAR_BYTES:
            self._read_block(offset)
            self.read_into(offset, out)
            return
        ahead = self._ahead
        if ahead is not None and ahead.offset <= offset and end <= ahead.end:
            ahead.wait()
            out[:] = ahead.out[offset - ahead.offset : end - ahead.offset]
            if end < ahead.end:
                return  # the rest of it may be asked for next
        else:
            self.close()
            _Stretch(offset, out, self._fetch).wait()
        self._ahead = None
        if len(out) >= PART_BYTES and end < self.size:  # rows in order: the next are asked for next
            self._ahead = _Stretch(end, memoryview(bytearray(min(len(out), self.size - end))), self._fetch)

    def _read_block(self, offset: int) -> None:
        """A block that is kept: the parts of a header, and what lies behind it, come by one request; so does all of a
        small file."""
        begin, length = (0, self.size) if self.size <= PART_BYTES else (offset, min(NEAR_BYTES, self.size - offset))
        block = bytearray(length)
        _Stretch(begin, memoryview(block), self._fetch).wait()
        self._block = begin, block

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()

    def _fetch(self, offset: int, out: memoryview) -> None:
        """One part, resumed where it breaks, or where a server gives less at once, until its time is over."""
        wanted, begin, failed, why = len(out), offset, 0, ""
        deadline = min(self._deadline, time.monotonic() + self._seconds)
        while out:
            if (left := deadline - time.monotonic()) <= 0:
                raise FetchError(
                    f"{self.name}: found {wanted - len(out)} of {wanted} bytes from {begin} on in time, "
                    "wanted all of them"
                )
            try:
                got = self._transport.fetch(offset, out, left)
            except Interrupted as error:
                got, why = 0, str(error)
            out, offset = out[got:], offset + got
            if got:
                continue
            failed += 1
            if failed == self._tries:
                raise RangesUnfit(
                    f"{self.name}: found {wanted - len(out)} of {wanted} bytes from {begin} on after {failed} tries "
                    f"({why or 'the server ended them'}), wanted all of them"
                )
            time.sleep(max(0.0, min(PAUSE_SECONDS * 2**failed, deadline - time.monotonic())))


class _Stretch:
    """Bytes on their way into `out`, in parts."""

    def __init__(self, offset: int, out: memoryview, fetch: Callable[[int, memoryview], None]) -> None:
        self.offset, self.end, self.out, self._fetch = offset, offset + len(out), out, fetch
        self._error: BaseException | None = None
        self._parts: SimpleQueue[int] = SimpleQueue()
        for begin in range(0, len(out), PART_BYTES):
            self._parts.put(begin)
        # Daemons: one that waits for a server does not hold up the end of the process.
        self._threads = [
            threading.Thread(target=self._work, name=f"wsi-range-{number}", daemon=True)
            for number in range(min(AT_ONCE, self._parts.qsize()))
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until all is there. Raises what went wrong."""
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Asks for no further part."""
        self._error = FetchError("stopped")

    def _work(self) -> None:
        try:
            while self._error is None:
                begin = self._parts.get_nowait()
                self._fetch(self.offset + begin, self.out[begin : begin + PART_BYTES])
        except Empty:
            pass
        except BaseException as error:
            self._error = error
