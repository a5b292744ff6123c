"""What a server takes while it is asked: memory of its processes, KV blocks, and its own counters."""

from __future__ import annotations

import threading

import psutil
from prometheus_client.parser import text_string_to_metric_families

from vllm_wsi.serving.server_process import VllmServer

SECONDS = 0.25
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


class ServerWatch:
    """Watches one server from `with` to its end; what it saw is then in its fields.

    `peak_memory_mib` and `idle_memory_mib` are proportional set sizes (PSS) of all its processes: shared pages count
    once. `peak_kv_share` is the largest share of the KV blocks in use that a sample met, four times a second.
    """

    def __init__(self, server: VllmServer) -> None:
        self._server = server
        self._processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
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
        while not self._stop.wait(SECONDS):
            self.peak_memory_mib = max(self.peak_memory_mib, self._memory_mib())
            self.peak_kv_share = max(self.peak_kv_share, self._server.metrics().get("vllm:kv_cache_usage_perc", 0.0))

    def _memory_mib(self) -> float:
        return sum(map(_pss, self._processes)) / 2**20


def kv_block_tokens(server: VllmServer) -> int:
    """Tokens of one KV block, as the server says in its metrics."""
    for family in text_string_to_metric_families(server.metrics_text()):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                return int(sample.labels["block_size"])
    raise ValueError(f"{server.root}/metrics: found no vllm:cache_config_info, wanted it")


def _pss(process: psutil.Process) -> int:
    """Bytes."""
    try:
        return process.memory_full_info().pss
    except psutil.NoSuchProcess:  # it has ended
        return 0
