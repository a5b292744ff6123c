"""All that a GPU can tell, in parts of ten minutes at most, the most valuable first: `python -m bench.gpu`.

Each part is a process of its own and leaves its rows, even if the next one fails. `--dry-run` needs no GPU: it checks
the arguments of every part and prints the plan.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench.common.record import RESULTS, ROOT


class Part(NamedTuple):
    """One process."""

    name: str
    minutes: int  # at most; then it is ended, and its rows so far stay
    module: str
    arguments: tuple[str, ...] = ()
    csv: str | None = None  # file of its rows; None: it writes none
    needs: str | None = None  # a package without which it is left out


PARTS = (
    Part("check", 4, "bench.kernels.card_check"),
    Part("cuda tests", 4, "pytest", ("-q", "-p", "no:cacheprovider", "tests/kernels/test_cuda.py")),
    Part("one slide", 10, "bench.kernels.score_topk",
         ("--part", "score_topk", "--rounds", "50", "--without", "torch.compile"), "kernels.csv"),
    Part("new slide", 5, "bench.selection.cold_slide", (), "cold_slide.csv"),
    Part("serving", 10, "bench.serving.throughput", ("--decoder", "qwen2.5-7b"), "serving.csv", "vllm"),
    Part("sweep", 10, "bench.kernels.sweep", (), "sweep.csv"),
    Part("select", 5, "bench.kernels.score_topk", ("--part", "select", "ragged", "--rounds", "50"), "kernels.csv"),
    Part("torch.compile", 10, "bench.kernels.score_topk", ("--part", "score_topk", "--rounds", "30"), "kernels.csv"),
    Part("all kernel tests", 10, "pytest", ("-q", "-p", "no:cacheprovider", "tests/kernels/interpreted")),
    Part("plot", 1, "bench.kernels.plot_score_topk", (), None, "matplotlib"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--dry-run", action="store_true", help="check the arguments and print the plan")
    args = parser.parse_args()
    parts = [part for part in PARTS if args.parts is None or part.name in args.parts]
    if args.dry_run:
        plan(parts, args.results)
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu: found no CUDA device, wanted one; --dry-run prints the plan")
    failed = [part.name for part in parts if not run(part, args.results)]
    if failed:
        raise SystemExit(f"gpu: found {len(failed)} parts that did not end well, wanted none: {', '.join(failed)}")


def plan(parts: list[Part], results: Path) -> None:
    """Prints every part with its time; a benchmark's arguments are read by its own parser."""
    for number, part in enumerate(parts, 1):
        if part.module != "pytest":
            importlib.import_module(part.module).parser().parse_args(command(part, results)[3:])
        elif not (ROOT / part.arguments[-1]).exists():
            raise SystemExit(f"gpu: {part.name}: found no {part.arguments[-1]}, wanted it")
        away = "" if is_there(part) else f"  (left out here: no {part.needs})"
        print(f"{number:2}  {part.minutes:3} min  {part.name:18} {' '.join(command(part, results)[1:])}{away}")
    print(f"    {sum(part.minutes for part in parts)} min at most")


def run(part: Part, results: Path) -> bool:
    """Whether the part ended well; one that is left out did."""
    if not is_there(part):
        print(f"gpu: {part.name}: left out, for {part.needs} is not installed", flush=True)
        return True
    print(f"gpu: {part.name}: at most {part.minutes} min", flush=True)
    began = time.monotonic()
    try:
        status = subprocess.run(command(part, results), cwd=ROOT, timeout=60 * part.minutes).returncode
    except subprocess.TimeoutExpired:
        status = -1
    found = "done" if status == 0 else "ended for its time" if status == -1 else f"FAILED with status {status}"
    print(f"gpu: {part.name}: {found} after {time.monotonic() - began:.0f} s", flush=True)
    return status in (0, -1)


def command(part: Part, results: Path) -> list[str]:
    rows = [] if part.csv is None else ["--csv", str(results / part.csv)]
    if part.name == "plot":
        rows = [str(results / "kernels.csv")]
    return [sys.executable, "-m", part.module, *part.arguments, *rows]


def is_there(part: Part) -> bool:
    return part.needs is None or importlib.util.find_spec(part.needs) is not None


if __name__ == "__main__":
    main()
