"""Scoring and Top-K against what people run today: `python -m bench.kernels.score_topk` on a CUDA machine.

Three parts, all in one CSV: `select` (Top-K of given fp32 scores), `ragged` (8 slides of lognormal length) and
`score_topk` (features to kept rows of one slide). One process, rounds that interleave all calls in random order,
medians of CUDA events. Every provider runs launched one by one (mode eager) and as a CUDA graph (mode graph), each
behind a 256 MiB write that empties L2 (l2 flushed) and right behind an untimed call of its own (l2 warm). Launches
queue behind that untimed work: an eager time holds launch gaps only where the queue runs dry.

Two ceilings are measured in the same run: a copy that moves as many bytes as X has, and the product X @ W. The floor
is the slower of the two. Every time is reported as a ratio to the floor and to the best baseline (whatever is neither
a ceiling nor ours); absolute times stand beside. A provider that cannot run here is left out, with one line that says
why. Nothing is timed before our answer was checked.

`--device cpu --quick` tries the harness without a GPU. `pytest bench/kernels/test_providers.py
--benchmark-enable` compares the same providers on a few shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import triton

from bench.common.record import RESULTS, append_row, check_header
from bench.kernels.providers import (
    CEILINGS,
    OURS,
    PROVIDERS,
    RAGGED,
    SELECTORS,
    TWO_LAUNCHES,
    Missing,
    Provider,
    check,
    copy_of,
    make_problem,
    selector,
    tried,
)

CSV = RESULTS / "kernels.csv"
COLUMNS = [
    "run", "triton", "driver", "part", "num_slides", "num_patches", "feature_dim", "hidden_size", "k", "dtype",
    "provider", "mode", "l2", "rounds", "median_us", "p20_us", "p80_us", "floor_us", "floor_over_time",
    "best_baseline_over_time", "sm_clock_mhz", "temperature_c",
]  # fmt: skip
PARTS = ("select", "ragged", "score_topk")
FLUSH_BYTES = 256 << 20
WARM_UP_ROUNDS = 25
SELECT_LENGTHS = [16_384, 65_536, 131_072, 262_144, 524_288, 1_048_576]

Call = tuple[str, str, str]  # mode, l2, provider


class Benchmark:
    """What is common to all measurements of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.csv, self.quick, self.without = args.csv, args.quick, args.without
        self.rounds: int = 3 if args.quick else args.rounds
        self.warm_up = 1 if args.quick else WARM_UP_ROUNDS
        self.run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.uint8, device=self.device)
        self.told: set[str] = set()

    def select(self) -> None:
        """Top-K of given scores."""
        for n in [4_096] if self.quick else SELECT_LENGTHS:
            scores = torch.randn(n, device=self.device)
            for k in [32] if self.quick else [32, 256]:
                builders: dict[str, Callable[[], Provider]] = {"copy": partial(copy_of, scores)}
                builders |= {name: partial(_selection, name, scores, k) for name in SELECTORS}
                self.compare(
                    {"part": "select", "num_slides": 1, "num_patches": n, "k": k, "dtype": "float32"}, builders
                )

    def ragged(self) -> None:
        """Several slides in one call, against a loop over them."""
        lengths = list(_lognormal(8, 500 if self.quick else 100_000))
        for d, h in [(512, 128)] if self.quick else [(512, 128), (512, 256), (1536, 256)]:
            self.slides("ragged", lengths, d, h, 32, RAGGED)

    def score_topk(self) -> None:
        """One slide, from features to kept rows."""
        shapes = [(4_000, 512, 128, 32)]
        if not self.quick:
            sizes = (4_000, 16_000, 100_000, 400_000)
            shapes = [(n, d, h, 32) for d in (512, 1536) for h in (0, 128, 256) for n in sizes]
            shapes += [(100_000, d, h, 32) for d in (1024, 2560) for h in (0, 128, 256, 512)]
            shapes += [(1_000_000, 512, 256, 32), (100_000, 1536, 256, 256)]
        for n, d, h, k in shapes:
            self.slides("score_topk", [n], d, h, k, PROVIDERS)

    def slides(self, part: str, lengths: list[int], d: int, h: int, k: int, names: Iterable[str]) -> None:
        problem = make_problem(lengths, d, h, k, self.dtype, self.device)
        check(problem)
        names = [name for name in names if h or name != "gemm"]
        shape = {
            "part": part, "num_slides": len(lengths), "num_patches": sum(lengths), "feature_dim": d, "hidden_size": h,
            "k": k, "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip
        self.compare(shape, {name: partial(PROVIDERS[name], problem) for name in names})

    def compare(self, shape: dict[str, object], builders: dict[str, Callable[[], Provider]]) -> None:
        """Measures all providers of one shape and appends a row for each, mode and state of L2."""
        calls: dict[tuple[str, str], Provider] = {}
        for name, build in builders.items():
            if name in self.without:
                continue
            with self.or_left_out(name):
                calls["eager", name] = tried(name, build)
        if self.cuda:
            for _, name in list(calls):
                with self.or_left_out(f"{name} as a CUDA graph"):
                    calls["graph", name] = tried(name, partial(graphed, calls["eager", name]))
        times = self.measure(calls)
        clock, temperature = gpu_state(self.device)
        medians = {call: statistics.median(values) for call, values in times.items()}
        for call, values in times.items():
            mode, l2, provider = call
            same = {name: median for (*state, name), median in medians.items() if state == [mode, l2]}
            floor = max(same[name] for name in CEILINGS if name in same)
            baselines = [median for name, median in same.items() if name not in (*CEILINGS, OURS, TWO_LAUNCHES)]
            quantiles = statistics.quantiles(values, n=5)
            row = dict.fromkeys(COLUMNS, "") | shape | {
                "run": self.run, "triton": triton.__version__, "driver": driver_version(),
                "provider": provider, "mode": mode, "l2": l2, "rounds": self.rounds,
                "median_us": f"{medians[call]:.1f}", "p20_us": f"{quantiles[0]:.1f}", "p80_us": f"{quantiles[3]:.1f}",
                "floor_us": f"{floor:.1f}", "floor_over_time": f"{floor / medians[call]:.3f}",
                "best_baseline_over_time": f"{min(baselines) / medians[call]:.3f}" if baselines else "",
                "sm_clock_mhz": clock, "temperature_c": temperature,
            }  # fmt: skip
            append_row(self.csv, row)
            print(
                f"{row['part']:10} {row['num_slides']} x {row['num_patches']:>9,} {row['feature_dim']:>5}"
                f" {row['hidden_size']:>4} {row['k']:>4}  {mode:6} {l2:8} {provider:32} {medians[call]:>10.1f} us"
                f"  floor/time {row['floor_over_time']:>6}  best baseline/time {row['best_baseline_over_time']:>6}",
                flush=True,
            )

    @contextlib.contextmanager
    def or_left_out(self, name: str) -> Iterator[None]:
        """Prints once why a provider cannot run here."""
        try:
            yield
        except Missing as reason:
            line = f"left out: {name}: {reason}"
            if line not in self.told:
                print(line, flush=True)
            self.told.add(line)

    def measure(self, calls: dict[tuple[str, str], Provider]) -> dict[Call, list[float]]:
        """Microseconds of every call in interleaved rounds."""
        states = ("flushed", "warm") if self.cuda else ("warm",)
        order = [(mode, l2, name) for mode, name in calls for l2 in states]
        times: dict[Call, list[float]] = {call: [] for call in order}
        for turn in range(self.warm_up + self.rounds):
            for call in random.sample(order, len(order)):
                mode, l2, name = call
                provider = calls[mode, name]
                if l2 == "flushed":
                    self.flush.zero_()
                else:
                    provider()
                taken = timed(provider, self.cuda)
                if turn >= self.warm_up:
                    times[call].append(taken)
        return times


def timed(provider: Provider, cuda: bool) -> float:
    """Microseconds of one call."""
    if not cuda:
        began = time.perf_counter()
        provider()
        return (time.perf_counter() - began) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    provider()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3


def graphed(provider: Provider) -> Provider:
    """The provider, captured once and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            provider()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        provider()
    return graph.replay


def gpu_state(device: torch.device) -> tuple[object, object]:
    """(SM clock in MHz, temperature in degrees Celsius) just now; empty where NVML is not at hand."""
    if device.type != "cuda":
        return "", ""
    try:
        return torch.cuda.clock_rate(device), torch.cuda.temperature(device)
    except Exception:  # no pynvml, no permission, no such counter: none of them is worth a benchmark
        return "", ""


def driver_version() -> str:
    """Of NVIDIA's kernel module; empty where there is none."""
    try:
        found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _selection(name: str, scores: torch.Tensor, k: int) -> Provider:
    return partial(selector(name, scores, k), scores)


def _lognormal(count: int, median: int) -> Iterator[int]:
    """Lengths of slides, the same in every run."""
    lengths = random.Random(0)
    for _ in range(count):
        yield max(64, round(median * lengths.lognormvariate(0, 0.5)))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    found.add_argument("--rounds", type=int, default=100)
    found.add_argument("--part", nargs="+", default=PARTS, choices=PARTS, help="only these parts")
    found.add_argument("--without", nargs="+", default=(), metavar="PROVIDER", help="leave out, e.g. torch.compile")
    found.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    found.add_argument("--quick", action="store_true", help="one small shape for each part, few rounds")
    return found


def main() -> None:
    args = parser().parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("score_topk: found no CUDA device, wanted one; --device cpu --quick tries the harness alone")
    if unknown := set(args.without) - {*PROVIDERS, *SELECTORS} | set(args.without) & {OURS, *CEILINGS}:
        raise SystemExit(f"score_topk: --without: cannot leave out {', '.join(sorted(unknown))}")
    check_header(args.csv, COLUMNS)
    random.seed(0)
    torch.manual_seed(0)
    benchmark = Benchmark(args)
    for part in args.part:
        getattr(benchmark, part)()


if __name__ == "__main__":
    main()
