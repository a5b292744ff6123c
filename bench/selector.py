"""Seconds and memory of one selection on the CPU: `python bench/selector.py [--quick] [--million]`.

Every shape is measured in fresh processes. Each imports torch, builds the selector and selects from a tiny slide, so
that lazy set-up is neither timed nor counted; what follows is

- peak memory: of the first selection, the highest resident set (VmHWM, reset just before through
  /proc/self/clear_refs) less the resident set just before it. The kernel keeps these counters to some 100 KiB.
  Files are read with pread: the page cache is the kernel's and not part of it.
- seconds: medians over the further selections of all processes, from a warm page cache, opening the file included.
  CPU seconds are those of all threads; on a machine shared with other jobs they are the steadier column.

Each shape is measured with one torch thread and with as many as there are cores, which is torch's default. On a busy
machine the latter can be the slower by far: OpenMP's threads spin at the end of each operation until the last of them
was given a core. The features are synthetic (fp16), the scorer's weights random: neither changes the work. K = 32,
h = 256.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import RESULTS, append_row, check_header

from vllm_wsi.slides import open_features
from vllm_wsi.slides.synthetic import write_synthetic_slide

CSV = RESULTS / "selector.csv"
COLUMNS = (
    "num_patches", "feature_dim", "dtype", "k", "scorer_hidden_size", "torch_threads", "selections",
    "seconds", "read_seconds", "score_seconds", "cpu_seconds", "rows_per_second", "peak_memory_mib",
)  # fmt: skip
SHAPES = [(n, d) for d in (512, 1536) for n in (1_000, 10_000, 100_000)]
MILLION = (1_000_000, 512)
K, HIDDEN, DTYPE, TINY = 32, 256, "float16", 64
PROCESSES, SELECTIONS = 3, 3


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory of one selection on the CPU.")
    parser.add_argument("--quick", action="store_true", help="small shapes, one process each")
    parser.add_argument("--million", action="store_true", help="also a slide of 1,000,000 x 512 (a file of 1 GB)")
    parser.add_argument("--child", nargs=3, metavar=("TINY", "SLIDE", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        tiny, slide, threads = args.child
        print(json.dumps(measure(Path(tiny), Path(slide), int(threads))))
        return
    check_header(CSV, COLUMNS)
    shapes = [shape for shape in SHAPES if shape[0] <= 10_000] if args.quick else SHAPES
    heads = ("ms", "read ms", "score ms", "CPU ms", "rows/s", "peak MiB")
    print(f"{'N':>9}{'d':>6}{'thr':>5}" + "".join(f"{head:>11}" for head in heads))
    for num_patches, feature_dim in shapes + [MILLION] * args.million:
        for row in bench_shape(num_patches, feature_dim, processes=1 if args.quick else PROCESSES):
            append_row(CSV, row)
            times = "".join(f"{row[f'{name}seconds'] * 1e3:11.1f}" for name in ("", "read_", "score_", "cpu_"))
            shape = f"{num_patches:9,}{feature_dim:6}{row['torch_threads']:5}"
            print(f"{shape}{times}{row['rows_per_second']:11,}{row['peak_memory_mib']:11.1f}", flush=True)


def bench_shape(num_patches: int, feature_dim: int, processes: int) -> list[dict]:
    """The rows of one shape; the numbers of threads alternate from process to process."""
    threads = sorted({1, len(os.sched_getaffinity(0))})
    runs: dict[int, list[dict]] = {count: [] for count in threads}
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-bench-") as folder:
        tiny, slide = Path(folder) / "tiny.safetensors", Path(folder) / "slide.safetensors"
        write_synthetic_slide(tiny, TINY, feature_dim, dtype=DTYPE)
        write_synthetic_slide(slide, num_patches, feature_dim, dtype=DTYPE)
        for count in threads * processes:
            command = [sys.executable, __file__, "--child", str(tiny), str(slide), str(count)]
            runs[count].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    return [row_of(num_patches, feature_dim, count, runs[count]) for count in threads]


def row_of(num_patches: int, feature_dim: int, threads: int, runs: list[dict]) -> dict:
    """One row of the CSV."""
    names = ("seconds", "read_seconds", "score_seconds", "cpu_seconds")
    medians = {name: statistics.median([value for run in runs for value in run[name]]) for name in names}
    values = (
        num_patches, feature_dim, DTYPE, K, HIDDEN, threads, len(runs) * SELECTIONS,
        *(round(seconds, 6) for seconds in medians.values()),
        round(num_patches / medians["seconds"]), round(max(run["peak_memory_mib"] for run in runs), 1),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def measure(tiny: Path, slide: Path, threads: int) -> dict:
    """In a process of its own: memory of one selection, then the times of some more."""
    import torch

    from vllm_wsi.sparsify.scorer import seeded_scorer
    from vllm_wsi.sparsify.selector import SlideSelector

    torch.set_num_threads(threads)
    with open_features(slide) as opened:
        feature_dim = opened.feature_dim
    weights = seeded_scorer("patch", feature_dim, HIDDEN, seed=0).requires_grad_(False).weights()
    selector = SlideSelector(weights, K)

    def select(path: Path) -> dict[str, float]:
        began, cpu = time.perf_counter(), time.process_time()
        with open_features(path) as opened:
            selection = selector.select(opened)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {
            "seconds": seconds,
            "read_seconds": selection.read_seconds,
            "score_seconds": selection.score_seconds,
            "cpu_seconds": cpu,
        }

    select(tiny)
    reset_peak_memory()
    before = resident_kib("VmRSS")
    select(slide)
    peak = (resident_kib("VmHWM") - before) / 1024
    times = [select(slide) for _ in range(SELECTIONS)]
    by_name = {name: [one[name] for one in times] for name in times[0]}
    return {**by_name, "peak_memory_mib": peak}


def reset_peak_memory() -> None:
    """Sets VmHWM, which getrusage's ru_maxrss follows, to the present resident set (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_kib(name: str) -> int:
    """VmRSS (now) or VmHWM (highest since the reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status: found no {name}")


if __name__ == "__main__":
    main()
