"""The benchmarks' harness runs, on the CPU and at tiny sizes; what it measures here says nothing."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_kernel_benchmark_compares_every_provider_that_runs_here(tmp_path):
    out = run("bench/kernels.py", "--device", "cpu", "--quick", "--csv", tmp_path / "rows.csv")
    rows = rows_of(tmp_path / "rows.csv")
    by_part = {part: {row["provider"] for row in rows if row["part"] == part} for part in ("select", "ragged")}
    assert by_part == {
        "select": {"copy", "ours", "torch.topk", "torch.topk of keys"},
        "ragged": {"copy", "gemm", "ours", "eager torch"},
    }
    providers = {row["provider"] for row in rows if row["part"] == "score_topk"}
    assert providers >= by_part["ragged"] | {"our scores + torch.topk", "our scores + torch.topk of keys"}
    assert all(float(row["median_us"]) > 0 for row in rows)
    assert "left out: torch.compile: not measured on the CPU" in out


def test_the_new_slide_benchmark_gives_a_row_for_each_state_of_the_page_cache(tmp_path):
    run("bench/cold_slide.py", "--device", "cpu", "--quick", "--csv", tmp_path / "rows.csv")
    rows = rows_of(tmp_path / "rows.csv")
    assert [row["page_cache"] for row in rows] == ["warm", "dropped"]
    assert all(float(row["total_over_floor"]) > 0 for row in rows)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_selector_benchmark_measures_itself_and_naive_torch():
    code = "import sys; sys.path.append('bench'); import selector; print(len(selector.bench_shape(300, 64, 1)))"
    assert int(run("-c", code)) >= 1
