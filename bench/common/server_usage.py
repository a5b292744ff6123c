"""What a server uses: what its processes hold at one moment, and what it takes while it is asked.

`Meter` measures memory, file handles, threads, shared memory and files without a name. `ServerWatch` samples memory and
KV blocks, and reads the server's own counters.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from vllm_wsi.serving.server_process import VllmServer

SHARED_MEMORY = Path("/dev/shm")
DELETED = " (deleted)"  # how Linux marks, in /proc, a file that has no name any more
API_SERVER = "API server"
SAMPLE_SECONDS = 0.25
COUNTERS = {
    "selections": "vllm_wsi:selections_total",
    "selection_cache_hits": "vllm_wsi:selection_cache_hits_total",
    "selections_joined": "vllm_wsi:selections_joined_total",
    "read_seconds": "vllm_wsi:read_seconds_sum",
    "score_seconds": "vllm_wsi:score_seconds_sum",
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
    "mm_queries": "vllm:mm_cache_queries_total",
    "mm_hits": "vllm:mm_cache_hits_total",
    "bytes_to_engine": "vllm_wsi_bench:bytes_to_engine_total",
}


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
        family = processes_of(self._pid)
        for process in family:
            self._shared |= _shared_files_of(process.pid)
        sizes = [size for path in self._shared if (size := _size(path)) is not None]
        return Holdings(tuple(_held_by(process, self._pid) for process in family), len(sizes), sum(sizes))


class ServerWatch:
    """Watches one server from `with` to its end; what it saw is then in its fields.

    `peak_memory_mib` and `idle_memory_mib` are proportional set sizes (PSS) of all its processes: shared pages count
    once. `peak_kv_share` is the largest share of the KV blocks in use that a sample met, four times a second.
    """

    def __init__(self, server: VllmServer) -> None:
        self._server = server
        self._processes = processes_of(server.pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.idle_memory_mib = self.peak_memory_mib = self._memory_mib()
        self.peak_kv_share = 0.0
        self.counted: dict[str, float] = {}

    def __enter__(self) -> ServerWatch:
        self._before = self._server.metrics()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        after = self._server.metrics()
        self.counted = {name: after.get(key, 0.0) - self._before.get(key, 0.0) for name, key in COUNTERS.items()}

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak_memory_mib = max(self.peak_memory_mib, self._memory_mib())
            self.peak_kv_share = max(self.peak_kv_share, self._server.metrics().get("vllm:kv_cache_usage_perc", 0.0))

    def _memory_mib(self) -> float:
        return sum(map(_pss, self._processes)) / 2**20


def processes_of(pid: int) -> list[psutil.Process]:
    """A server and every process below it. Raises psutil.Error where it is gone."""
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]


def kv_block_tokens(server: VllmServer) -> int:
    """Tokens of one KV block, as the server says in its metrics."""
    for family in text_string_to_metric_families(server.metrics_text()):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                return int(sample.labels["block_size"])
    raise ValueError(f"{server.root}/metrics: found no vllm:cache_config_info, wanted it")


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


def _pss(process: psutil.Process) -> int:
    """Bytes."""
    try:
        return process.memory_full_info().pss
    except psutil.NoSuchProcess:  # it has ended
        return 0
