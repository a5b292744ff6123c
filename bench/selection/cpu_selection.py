"""Seconds and memory of one selection on the CPU, and of naive torch.

    python -m bench.selection.cpu_selection [--quick] [--million]

Every shape is measured in fresh processes. Each imports torch, builds the selector and selects from a tiny slide, so
that lazy set-up is neither timed nor counted; what follows is

- peak memory: of the first selection, the highest resident set (VmHWM, reset just before through
  /proc/self/clear_refs) less the resident set just before it. The kernel keeps these counters to some 100 KiB.
  Files are read with pread: the page cache is the kernel's and not part of it.
- seconds: medians over the further selections of all processes, from a warm page cache, opening the file included.
  CPU seconds are those of all threads; on a machine shared with other jobs they are the steadier column.

Beside it, in the same processes and in turns with it, stands what a user writes first (naive): load the file, upcast
the whole matrix to fp32, LayerNorm, Linear, GELU, Linear, topk, index.

Each shape is measured on one core and on all of them. The features are synthetic (fp16), the scorer's weights random:
neither changes the work. K = 32, h = 256.
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
from typing import TYPE_CHECKING

from bench.common.record import RESULTS, ROOT, append_row, check_header
from vllm_wsi.slides import open_features
from vllm_wsi.slides.synthetic import write_synthetic_slide

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_wsi.kernels import ScorerWeights

MODULE = "bench.selection.cpu_selection"  # the children run it
CSV = RESULTS / "selector.csv"
COLUMNS = (
    "num_patches", "feature_dim", "dtype", "k", "scorer_hidden_size", "cores_used", "selections",
    "seconds", "read_seconds", "score_seconds", "cpu_seconds", "rows_per_second", "peak_memory_mib",
    "naive_seconds", "naive_cpu_seconds", "naive_peak_memory_mib", "cpu_over_naive",
)  # fmt: skip
SHAPES = [(n, d) for d in (512, 1536) for n in (1_000, 10_000, 100_000)]
MILLION = (1_000_000, 512)
K, HIDDEN, DTYPE, TINY = 32, 256, "float16", 64
PROCESSES, SELECTIONS = 3, 3


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory of one selection on the CPU.")
    parser.add_argument("--quick", action="store_true", help="small shapes, one process each")
    parser.add_argument("--million", action="store_true", help="also a slide of 1,000,000 x 512 (a file of 1 GB)")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    parser.add_argument("--child", nargs=3, metavar=("TINY", "SLIDE", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        tiny, slide, cores = args.child
        print(json.dumps(measure(Path(tiny), Path(slide), int(cores))))
        return
    check_header(args.csv, COLUMNS)
    shapes = [shape for shape in SHAPES if shape[0] <= 10_000] if args.quick else SHAPES
    heads = ("ms", "read ms", "score ms", "CPU ms", "rows/s", "peak MiB", "naive ms", "CPU ms", "peak MiB", "CPU ratio")
    print(f"{'N':>9}{'d':>6}{'cores':>6}" + "".join(f"{head:>11}" for head in heads))
    for num_patches, feature_dim in shapes + [MILLION] * args.million:
        for row in bench_shape(num_patches, feature_dim, processes=1 if args.quick else PROCESSES):
            append_row(args.csv, row)
            times = "".join(f"{row[f'{name}seconds'] * 1e3:11.1f}" for name in ("", "read_", "score_", "cpu_"))
            shape = f"{num_patches:9,}{feature_dim:6}{row['cores_used']:6}"
            naive = "".join(f"{row[f'naive_{name}seconds'] * 1e3:11.1f}" for name in ("", "cpu_"))
            naive += f"{row['naive_peak_memory_mib']:11.1f}{row['cpu_over_naive']:11.2f}"
            print(f"{shape}{times}{row['rows_per_second']:11,}{row['peak_memory_mib']:11.1f}{naive}", flush=True)


def bench_shape(num_patches: int, feature_dim: int, processes: int) -> list[dict]:
    """The rows of one shape; the numbers of cores alternate from process to process."""
    cores = sorted({1, len(os.sched_getaffinity(0))})
    runs: dict[int, list[dict]] = {count: [] for count in cores}
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-bench-") as folder:
        tiny, slide = Path(folder) / "tiny.safetensors", Path(folder) / "slide.safetensors"
        write_synthetic_slide(tiny, TINY, feature_dim, dtype=DTYPE)
        write_synthetic_slide(slide, num_patches, feature_dim, dtype=DTYPE)
        for count in cores * processes:
            command = [sys.executable, "-m", MODULE, "--child", str(tiny), str(slide), str(count)]
            runs[count].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout))
    return [row_of(num_patches, feature_dim, count, runs[count]) for count in cores]


def row_of(num_patches: int, feature_dim: int, cores: int, runs: list[dict]) -> dict:
    """One row of the CSV."""
    names = ("seconds", "read_seconds", "score_seconds", "cpu_seconds", "naive_seconds", "naive_cpu_seconds")
    medians = {name: statistics.median([value for run in runs for value in run[name]]) for name in names}
    rounded = [round(seconds, 6) for seconds in medians.values()]
    peaks = [round(max(run[name] for run in runs), 1) for name in ("peak_memory_mib", "naive_peak_memory_mib")]
    values = (
        num_patches, feature_dim, DTYPE, K, HIDDEN, cores, len(runs) * SELECTIONS,
        *rounded[:4], round(num_patches / medians["seconds"]), peaks[0],
        *rounded[4:], peaks[1], round(medians["cpu_seconds"] / medians["naive_cpu_seconds"], 3),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def measure(tiny: Path, slide: Path, cores: int) -> dict:
    """In a process of its own: memory of one selection, then the times of some more."""
    import torch

    from vllm_wsi.selection.scorer import seeded_scorer
    from vllm_wsi.selection.selector import SlideSelector

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    with open_features(slide) as opened:
        feature_dim = opened.feature_dim
    weights = seeded_scorer("patch", feature_dim, HIDDEN, seed=0).requires_grad_(False).weights()
    selector = SlideSelector(weights, K)

    def select(path: Path) -> dict[str, float]:
        began, cpu = time.perf_counter(), time.process_time()
        with open_features(path) as opened:
            selection = selector.select(opened)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        read, score = selection.read_seconds, selection.score_seconds
        return {"seconds": seconds, "read_seconds": read, "score_seconds": score, "cpu_seconds": cpu}

    def naive(path: Path) -> dict[str, float]:
        began, cpu = time.perf_counter(), time.process_time()
        with torch.no_grad():
            select_naively(path, weights)
        return {"naive_seconds": time.perf_counter() - began, "naive_cpu_seconds": time.process_time() - cpu}

    peaks = {}
    for name, call in (("peak_memory_mib", select), ("naive_peak_memory_mib", naive)):
        call(tiny)
        reset_peak_memory()
        before = resident_kib("VmRSS")
        call(slide)
        peaks[name] = (resident_kib("VmHWM") - before) / 1024
    times = [select(slide) | naive(slide) for _ in range(SELECTIONS)]
    return {name: [one[name] for one in times] for name in times[0]} | peaks


def select_naively(path: Path, weights: ScorerWeights) -> tuple[Tensor, Tensor]:
    """(kept rows, their indices), with the whole matrix in fp32."""
    import torch.nn.functional as F
    from safetensors.torch import load_file

    features = load_file(path)["features"]
    x = F.layer_norm(features.float(), (weights.feature_dim,), weights.norm_weight, weights.norm_bias, weights.norm_eps)
    x = F.gelu(F.linear(x, weights.hidden_weight, weights.hidden_bias))
    scores = F.linear(x, weights.out_weight[None], weights.out_bias[None])[:, 0]
    kept = scores.topk(min(K, len(scores))).indices.sort().values
    return features[kept], kept


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
