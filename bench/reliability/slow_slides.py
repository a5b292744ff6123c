"""Slides that are slow: files whose opening the kernel holds up, and downloads that trickle. Linux only."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from bench.reliability.random_slides import QuietHandler

TRICKLE_BYTES, TRICKLE_SECONDS = 4096, 0.05  # 80 KB/s
LEASE_SECONDS = int(Path("/proc/sys/fs/lease-break-time").read_text())  # the kernel ends a stall after these


class StalledFiles:
    """Files that nobody can open before `release`, or before the kernel loses patience after `LEASE_SECONDS`.

    The caller holds a write lease on each: an `open` of it then waits within the kernel, as it would for a file on a
    network that does not answer. No code of the server is changed for that.

    Raises:
        OSError: a file belongs to another user, or somebody has it open.
    """

    def __init__(self, paths: list[Path]) -> None:
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel's word that somebody waits, which else ends us
        self._handles = []
        for path in paths:
            self._handles.append(os.open(path, os.O_RDWR))
            fcntl.fcntl(self._handles[-1], fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def waited_for(self) -> int:
        """How many of the files somebody waits for."""
        return sum(fcntl.fcntl(handle, fcntl.F_GETLEASE) != fcntl.F_WRLCK for handle in self._handles)

    def release(self) -> None:
        for handle in self._handles:
            fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            os.close(handle)
        self._handles = []


class TrickleServer:
    """A web server of a folder whose downloads trickle while `slow` is set."""

    def __init__(self, folder: Path) -> None:
        self.slow = threading.Event()
        slow = self.slow

        class Handler(QuietHandler):
            def copyfile(self, source, outputfile) -> None:
                while slow.is_set() and (part := source.read(TRICKLE_BYTES)):
                    outputfile.write(part)
                    time.sleep(TRICKLE_SECONDS)
                super().copyfile(source, outputfile)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[TrickleServer]:
        with self._server:
            threading.Thread(target=self._server.serve_forever, daemon=True).start()
            yield self
            self._server.shutdown()
