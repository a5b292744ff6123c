"""What the processes of a server hold: memory, file handles, threads, shared memory, files without a name."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
DELETED = " (deleted)"  # how Linux marks, in /proc, a file that has no name any more
API_SERVER = "API server"


@dataclass(frozen=True)
class Holding:
    """What one process holds."""

    pid: int
    role: str  # API_SERVER, or the name that the process gave itself
    uss_bytes: int  # memory that would be free again if the process ended
    rss_bytes: int
    handles: Counter[str]  # number of file handles of each kind: "socket", a path ..
    threads: int
    unnamed_files: int  # open files on disk or in /dev/shm whose name is gone
    unnamed_bytes: int


@dataclass(frozen=True)
class Holdings:
    """What all processes of a server hold."""

    processes: tuple[Holding, ...]
    shared_files: int  # in /dev/shm
    shared_bytes: int

    @property
    def api_server(self) -> Holding:
        return self.processes[0]

    @property
    def handles(self) -> Counter[str]:
        return sum((one.handles for one in self.processes), Counter())

    def total(self, what: str) -> int:
        return sum(getattr(one, what) for one in self.processes)

    def uss_bytes(self, api_server: bool) -> int:
        """Of the API server, or of all other processes."""
        return sum(one.uss_bytes for one in self.processes if (one.role == API_SERVER) == api_server)


class Meter:
    """Measures a server and every process below it. Linux only.

    In /dev/shm those files count that a process of the server holds, or held when it was measured before: others'
    files come and go. One that was made and let go between two measurements is not seen.

    Args:
        pid: of the server.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._shared: set[Path] = set()

    def measure(self) -> Holdings:
        """Raises psutil.Error where the server is gone."""
        server = psutil.Process(self._pid)
        family = [server, *server.children(recursive=True)]
        for process in family:
            self._shared |= _shared_files_of(process.pid)
        sizes = [size for path in self._shared if (size := _size(path)) is not None]
        return Holdings(tuple(_held_by(process, self._pid) for process in family), len(sizes), sum(sizes))


def _held_by(process: psutil.Process, server: int) -> Holding:
    memory, handles, unnamed = process.memory_full_info(), Counter[str](), []
    for handle in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            target = os.readlink(handle)
            handles[re.sub(r":\[\d+\]$", "", target)] += 1  # sockets and pipes have a number each
            if target.startswith("/") and target.endswith(DELETED):
                unnamed.append(handle.stat().st_size)
    return Holding(
        pid=process.pid,
        role=API_SERVER if process.pid == server else process.name(),
        uss_bytes=memory.uss,
        rss_bytes=memory.rss,
        handles=handles,
        threads=process.num_threads(),
        unnamed_files=len(unnamed),
        unnamed_bytes=sum(unnamed),
    )


def _shared_files_of(pid: int) -> set[Path]:
    """Files in /dev/shm that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    paths = (line.split(maxsplit=5)[5] for line in lines if f"{SHARED_MEMORY}/" in line)
    return {Path(path) for path in paths if not path.endswith(DELETED)}


def _size(path: Path) -> int | None:
    """Bytes; None where there is no such file any more."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
