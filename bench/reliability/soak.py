"""Mixed requests to a real `vllm serve`, and what its processes hold before and after.

    python -m bench.reliability.soak

A server with a small random checkpoint (d = 64, K = 32) answers 1,000 requests over HTTP, 16 in flight, of the mixture
in `soak_requests.py`: new, repeated and rewritten slides of every format, several in a prompt, other K, by value, from
the web, text alone, clients that go away, broken files, selections and heat maps. Each must end as it must.

What is measured, with the server idle and no connection open: memory, file handles and threads of every process of
the server, files in /dev/shm, open files without a name. First after a warm-up of the same mixture, then after each
half of the requests. Memory is the unique set size (USS): what would be free again if the process ended.

The soak fails, with exit code 1 and one sentence, where

- a request ended otherwise than it must,
- file handles of any kind, shared memory or unnamed files are more than after the warm-up,
- threads are more than the pools explain that fill as they are needed (`pooled_threads`),
- memory grew, since the warm-up and again in the second half alone, by more than the caches and allocators explain.

Of memory the caches explain this. vLLM's own are made small enough here to be full after the warm-up: its key-value
blocks, its processed slides, and oneDNN's compiled kernels (1,024 shapes by default, and a worker's memory grows until
it has met so many). Finished selections are remembered up to 256 MB, more than a soak fills, so each new one counts: K
rows of d float32 with their indices, scores and places, and as much again for Python's objects and heat maps.

glibc's malloc keeps freed memory: buffers of up to 32 MiB stay with the arena of the thread that made them, and the
small selections that are made beside them hold them there. So the server is told to give large buffers back
(`RETURNING`), and `NOISE_BYTES` is for what is left. A slide of the soak has 0.25 to 1 MiB of features, and more than
half of the requests bring one: if one request in ten left its slide behind, 1,000 would leave 60 MiB. Leaks of less
than 32 KiB a request are not found. `--allocator default` measures what glibc keeps when left alone, and does not
judge memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path

from bench.common.record import RESULTS, append_row, check_header
from bench.common.server_usage import Holdings, Meter
from bench.reliability.random_slides import D, Slides, web_server
from bench.reliability.soak_requests import MAX_SLIDES, K, Requests
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.serving.service import LOOK_UP_THREADS, THREADS

CSV = RESULTS / "soak.csv"
REQUESTS, WARM_UP, IN_FLIGHT = 1000, 300, 16
NOISE_BYTES = 32 << 20
CACHE_OVERHEAD = 2
SMALL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
RETURNING = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
QUIET_SECONDS, POLL_SECONDS = 30, 1
SERVER_ARGS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", str(IN_FLIGHT),
    "--limit-mm-per-prompt", f'{{"image": {MAX_SLIDES}}}',
    # Caches that are full after the warm-up: 144 blocks of 128 tokens, and one MiB of processed slides.
    "--num-gpu-blocks-override", "144", "--mm-processor-cache-gb", "0.001",
)  # fmt: skip
TIMES = ("warm", "half", "end")
MEASURED = (
    "api_uss_mib", "api_rss_mib", "others_uss_mib", "others_rss_mib", "handles", "threads",
    "shm_files", "shm_mib", "unnamed_files", "unnamed_mib",
)  # fmt: skip
COLUMNS = (
    "allocator", "warm_up_requests", "requests", "in_flight", "wrong_outcomes", "seconds", "selections", "cached_mib",
    *(f"{what}_{when}" for what in MEASURED for when in TIMES),
)  # fmt: skip
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixed requests to a real vllm serve: does it leak?")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--warm-up", type=int, default=WARM_UP)
    parser.add_argument("--allocator", choices=("returning", "default"), default="returning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=CSV)
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-soak-") as folder:
        soak = asyncio.run(run(Path(folder), Soak(args.warm_up, args.requests, args.allocator), args.seed))
    append_row(args.csv, soak.row())
    print(soak.table())
    if faults := soak.faults():
        raise SystemExit("; ".join(faults))


class Soak:
    """What a soak found."""

    def __init__(self, warm_up: int, requests: int, allocator: str) -> None:
        self.warm_up, self.requests, self.allocator = warm_up, requests, allocator
        self.wrong: list[str] = []
        self.seconds = 0.0  # of the requests after the warm-up
        self.held: dict[str, Holdings] = {}  # by TIMES
        self.selections: dict[str, float] = {}  # made so far, by TIMES

    def cached_bytes(self, since: str = "warm") -> float:
        """At most what the remembered selections grew by."""
        one = K * (D * 4 + 8 + 4 + 16) + 2048
        return CACHE_OVERHEAD * one * (self.selections["end"] - self.selections[since])

    def faults(self) -> list[str]:
        """One sentence for each; none where all is well."""
        warm, end = self.held["warm"], self.held["end"]
        faults = [f"{len(self.wrong)} requests ended otherwise than they must: {self.wrong[0]}"] if self.wrong else []
        if more := end.handles - warm.handles:
            grown = ", ".join(f"{count} x {kind}" for kind, count in more.items())
            faults.append(f"file handles: found more than after the warm-up ({grown}), wanted none")
        for name, before, after, spare in (
            ("files in /dev/shm", warm.shared_files, end.shared_files, 0),
            ("bytes in /dev/shm", warm.shared_bytes, end.shared_bytes, 0),
            ("unnamed files", warm.total("unnamed_files"), end.total("unnamed_files"), 0),
            ("bytes of unnamed files", warm.total("unnamed_bytes"), end.total("unnamed_bytes"), 0),
            ("threads", warm.total("threads"), end.total("threads"), pooled_threads()),
        ):
            if after > before + spare:
                faults.append(f"{name}: found {after} at the end, wanted at most the {before + spare} of the warm-up")
        for name, is_api in (("API server", True), ("other processes", False)):
            whole, second = (
                end.uss_bytes(is_api) - self.held[since].uss_bytes(is_api) - is_api * self.cached_bytes(since)
                for since in ("warm", "half")
            )
            if self.allocator == "returning" and whole > NOISE_BYTES and second > NOISE_BYTES / 2:
                faults.append(
                    f"memory of the {name}: found {whole / MIB:.0f} MiB more than after the warm-up "
                    f"({second / MIB:.0f} of them in the second half), caches aside, "
                    f"wanted at most {NOISE_BYTES / MIB:.0f}"
                )
        return faults

    def row(self) -> dict[str, object]:
        by_time = {when: measured_values(held) for when, held in self.held.items()}
        values = (
            self.allocator, self.warm_up, self.requests, IN_FLIGHT, len(self.wrong), round(self.seconds, 1),
            int(self.selections["end"] - self.selections["warm"]), round(self.cached_bytes() / MIB, 1),
            *(by_time[when][what] for what in MEASURED for when in TIMES),
        )  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))

    def table(self) -> str:
        by_time = [measured_values(self.held[when]) for when in TIMES]
        lines = [f"{'':16}" + "".join(f"{head:>14}" for head in ("warm", "half", "end"))]
        lines += [f"{what:16}" + "".join(f"{values[what]:14,}" for values in by_time) for what in MEASURED]
        lines.append(f"selections remembered: at most {self.cached_bytes() / MIB:.1f} MiB of them new")
        for one in self.held["end"].processes:
            uss = f"{one.uss_bytes / MIB:.1f} MiB"
            lines.append(f"  {one.role}: {uss}, {one.handles.total()} handles, {one.threads} threads")
        return "\n".join(lines)


def pooled_threads() -> int:
    """At most what the pools of an API server fill up by after a warm-up."""
    team = os.cpu_count() or 1  # OpenMP gives each thread that scores a team of its own
    return THREADS * team + LOOK_UP_THREADS + 8 + 4 + 4 + min(32, team + 4)  # vLLM's media, headers, pixels, asyncio


def measured_values(held: Holdings) -> dict[str, float]:
    others = [one.rss_bytes for one in held.processes if one is not held.api_server]
    return {
        "api_uss_mib": round(held.api_server.uss_bytes / MIB, 1),
        "api_rss_mib": round(held.api_server.rss_bytes / MIB, 1),
        "others_uss_mib": round(held.uss_bytes(False) / MIB, 1),
        "others_rss_mib": round(sum(others) / MIB, 1),
        "handles": held.handles.total(),
        "threads": held.total("threads"),
        "shm_files": held.shared_files,
        "shm_mib": round(held.shared_bytes / MIB, 3),
        "unnamed_files": held.total("unnamed_files"),
        "unnamed_mib": round(held.total("unnamed_bytes") / MIB, 3),
    }


async def run(work: Path, soak: Soak, seed: int) -> Soak:
    media = work / "slides"
    media.mkdir()
    init_checkpoint(
        work / "checkpoint",
        TinySettings(
            feature_dim=D, hidden_size=64, scorer_hidden_size=32, num_slide_tokens=K, max_position_embeddings=131072
        ),
    )
    slides = Slides(media, seed)
    env = SMALL_CACHES | (RETURNING if soak.allocator == "returning" else {})
    with (
        web_server(media) as web,
        VllmServer(work / "checkpoint", media, work / "server.log", SERVER_ARGS, env) as server,
    ):
        meter, mixed = Meter(server.pid), Requests(server.api, server.model, slides, web, seed)
        counts = (soak.warm_up, soak.requests // 2, soak.requests - soak.requests // 2)
        for when, count in zip(TIMES, counts, strict=True):
            began = time.perf_counter()
            soak.wrong += await mixed.run(count, IN_FLIGHT)
            soak.seconds += time.perf_counter() - began if when != "warm" else 0
            soak.held[when] = quiet(server, meter, soak.held.get("warm"))
            soak.selections[when] = server.metrics().get("vllm_wsi:selections_total", 0)
            print(f"{when}: {count} requests in {time.perf_counter() - began:.1f} s", flush=True)
        print(", ".join(f"{count} {kind}" for kind, count in mixed.done.items()))
        if soak.wrong:
            print("\n".join(soak.wrong[:20]), server.log_tail(), sep="\n")
    return soak


def quiet(server: VllmServer, meter: Meter, wanted: Holdings | None) -> Holdings:
    """What is held once no request runs and no handle is closed any more, or `QUIET_SECONDS` have passed.

    Args:
        wanted: handles above these are waited for.

    Raises:
        SystemExit: requests still run, whose clients have gone.
    """
    deadline = time.monotonic() + QUIET_SECONDS
    before = meter.measure()
    while True:
        time.sleep(POLL_SECONDS)
        held, metrics = meter.measure(), server.metrics()
        running = sum(metrics[f"vllm:num_requests_{state}"] for state in ("running", "waiting"))
        is_quiet = held.handles == before.handles and (wanted is None or not held.handles - wanted.handles)
        if is_quiet and not running:
            return held
        if time.monotonic() > deadline:
            if running:
                raise SystemExit(f"requests: found {running:.0f} that still run without a client, wanted none")
            return held
        before = held


if __name__ == "__main__":
    main()
