"""Seconds from a feature file to its kept patches on a CUDA machine, against two floors.

    python -m bench.selection.cold_slide

Three times of the same file, in interleaved rounds, medians: reading it alone, uploading as many bytes from pinned
memory alone, and the whole selection by `SlideSelector`. The aim is a selection that takes about max(read, upload).
Each from a warm page cache, and from one that was asked to forget the file (`posix_fadvise`; a file system may ignore
that). `--device cpu --quick` tries the harness without a GPU: its upload is a copy in memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.common.record import RESULTS, append_row, check_header
from vllm_wsi.selection.chunk_reader import ChunkReader
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import open_features
from vllm_wsi.slides.synthetic import write_synthetic_slide

CSV = RESULTS / "cold_slide.csv"
COLUMNS = (
    "num_patches", "feature_dim", "dtype", "k", "scorer_hidden_size", "device", "page_cache", "rounds",
    "read_seconds", "upload_seconds", "total_seconds", "total_over_floor",
)  # fmt: skip
SHAPES = [(n, d) for d in (512, 1536) for n in (10_000, 100_000, 400_000)]
K, HIDDEN, DTYPE = 32, 256, "float16"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    found.add_argument("--rounds", type=int, default=9)
    found.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    found.add_argument("--folder", type=Path, help="where the slides are written; default: the temporary folder")
    found.add_argument("--quick", action="store_true", help="one small shape, two rounds")
    return found


def main() -> None:
    args = parser().parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("cold_slide: found no CUDA device, wanted one; --device cpu --quick tries the harness alone")
    check_header(args.csv, COLUMNS)
    for num_patches, feature_dim in [(1_000, 512)] if args.quick else SHAPES:
        with tempfile.TemporaryDirectory(prefix="vllm-wsi-bench-", dir=args.folder) as folder:
            path = Path(folder) / "slide.safetensors"
            write_synthetic_slide(path, num_patches, feature_dim, dtype=DTYPE)
            for row in bench_slide(path, torch.device(args.device), 2 if args.quick else args.rounds):
                append_row(args.csv, row)
                print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def bench_slide(path: Path, device: torch.device, rounds: int) -> list[dict[str, object]]:
    """One row for each state of the page cache."""
    with open_features(path) as slide:
        num_patches, feature_dim = slide.num_patches, slide.feature_dim
        chunk = next(ChunkReader(slide).chunks())[1].clone()
    weights = seeded_scorer("patch", feature_dim, HIDDEN, seed=0).requires_grad_(False).weights()
    selector = SlideSelector(weights, K, device.type)
    chunk = chunk.pin_memory() if device.type == "cuda" else chunk

    def read() -> None:
        with open_features(path) as slide:
            for _ in ChunkReader(slide).chunks():
                pass

    def upload() -> None:
        for start in range(0, num_patches, len(chunk)):
            part = chunk[: num_patches - start]
            part.to(device, non_blocking=True) if device.type == "cuda" else part.clone()

    def total() -> None:
        with open_features(path) as slide:
            selector.select(slide)

    calls = {"read": read, "upload": upload, "total": total}
    rows = []
    for page_cache in ("warm", "dropped"):
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):  # the first one starts CUDA and compiles
            for name, call in calls.items():
                taken = seconds(call, path if page_cache == "dropped" else None, device)
                if turn:
                    times[name].append(taken)
        medians = {name: statistics.median(values) for name, values in times.items()}
        floor = max(medians["read"], medians["upload"])
        values = (
            num_patches, feature_dim, DTYPE, K, HIDDEN, device.type, page_cache, rounds,
            *(round(medians[name], 6) for name in calls), round(medians["total"] / floor, 3),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def seconds(call: Callable[[], None], forget: Path | None, device: torch.device) -> float:
    """Of one call; the page cache forgets a file before it."""
    if forget is not None:
        file = os.open(forget, os.O_RDONLY)
        os.fsync(file)  # only written pages can be forgotten
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
