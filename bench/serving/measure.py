"""Cases that are measured in turns, and the row that each becomes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.common.record import append_row
from bench.common.server_usage import COUNTERS, ServerWatch, kv_block_tokens
from bench.serving.vllm_client import Measured, run_load
from bench.serving.workload import MOST_PATCHES, Asked, Workload
from vllm_wsi.serving.server_process import VllmServer

COLUMNS = (
    "run", "decoder", "feature_dim", "part", "case", "server", "x", "k", "requests", "concurrency", "output_tokens",
    "requests_per_s", "output_tokens_per_s", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms",
    "itl_p50_ms", "itl_p90_ms", "itl_p99_ms", "prompt_tokens", "kv_block_tokens", "kv_blocks_per_request",
    "peak_kv_share", "idle_memory_mib", "peak_memory_mib", "request_body_bytes", "bytes_to_engine",
    "selections", "selection_cache_hit_rate", "prefix_cache_hit_rate", "mm_cache_hit_rate", "read_ms", "score_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much is asked."""

    rounds: int = 3
    slides: int = 32
    most_patches: int = MOST_PATCHES
    requests: int = 64
    slow_requests: int = 12  # of cases that take long a request
    concurrency: int = 8
    crowd: int = 64
    output_tokens: int = 8
    patches: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    at_once: tuple[int, ...] = (1, 4, 16, 64)
    distinct: tuple[int, ...] = (1, 8, 64)
    tokens: tuple[int, ...] = (8, 32, 128, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Case:
    """One row: data sets, one for each round, and the server that they are sent to.

    Args:
        asked: makes the data set of a round; cases that are compared ask the same of a round.
        x: what grows, in a part where something grows.
    """

    name: str
    server: str
    k: int
    concurrency: int
    asked: Callable[[int], Asked]
    x: int = 0


class Bench:
    """The servers, the slides, and the rows that are measured on them."""

    def __init__(
        self, decoder: str, sizes: Sizes, servers: Mapping[str, VllmServer], work: Workload, csv: Path
    ) -> None:
        self.sizes, self.servers, self.work = sizes, servers, work
        self._decoder, self._csv = decoder, csv
        self._run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def measure(self, part: str, cases: Sequence[Case], rounds: int) -> None:
        """Runs the cases in turns, in another order each round, and appends a row for each."""
        pooled = {case: Measured() for case in cases}
        watches: dict[Case, list[ServerWatch]] = {case: [] for case in cases}
        bodies: dict[Case, float] = {}
        for number in range(rounds):
            for case in random.sample(cases, len(cases)):
                asked = case.asked(number)
                server = self.servers[case.server]
                with ServerWatch(server) as watch:
                    pooled[case].add(run_load(server, asked, case.concurrency, self.sizes.output_tokens))
                asked.path.unlink()
                watches[case].append(watch)
                bodies[case] = asked.body_bytes
        for case in cases:
            row = self._row(part, case, pooled[case], watches[case], bodies[case])
            append_row(self._csv, row)
            print(
                f"{part:10} {case.name:20} {case.server:18} {case.x or '':>9} {row['requests_per_s']:8} req/s "
                f"TTFT {row['ttft_p50_ms']:8} / {row['ttft_p99_ms']:8} ms {row['kv_blocks_per_request']:6} KV blocks",
                flush=True,
            )

    def _row(self, part: str, case: Case, found: Measured, watches: Sequence[ServerWatch], body: float) -> dict:
        counted = {name: sum(watch.counted[name] for watch in watches) for name in COUNTERS}
        made = counted["selections"]
        known = counted["selection_cache_hits"] + counted["selections_joined"]
        block = kv_block_tokens(self.servers[case.server])
        blocks = [math.ceil((n + self.sizes.output_tokens) / block) for n in found.prompt_tokens]
        values = (
            self._run, self._decoder, self.work.feature_dim, part, case.name, case.server, case.x, case.k,
            found.requests, case.concurrency, self.sizes.output_tokens,
            _short(found.requests / found.seconds), _short(found.output_tokens / found.seconds),
            *(_short(ms) for ms in found.latencies().values()),
            _short(sum(found.prompt_tokens) / found.requests), block, _short(sum(blocks) / found.requests),
            _short(max(watch.peak_kv_share for watch in watches)),
            _short(min(watch.idle_memory_mib for watch in watches)),
            _short(max(watch.peak_memory_mib for watch in watches)),
            round(body), round(counted["bytes_to_engine"] / found.requests),
            round(made), _ratio(known, known + made), _ratio(counted["prefix_hits"], counted["prefix_queries"]),
            _ratio(counted["mm_hits"], counted["mm_queries"]),
            _ratio(counted["read_seconds"] * 1e3, made), _ratio(counted["score_seconds"] * 1e3, made),
        )  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))


def _short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def _ratio(part: float, whole: float) -> float | str:
    return _short(part / whole) if whole else ""
