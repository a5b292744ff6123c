"""A short run of `bench/reliability/soak.py`: nothing grows, and every request ends as it must."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.server


def test_mixed_requests_leave_no_handle_no_shared_memory_and_no_slide_behind(tmp_path):
    table = tmp_path / "soak.csv"
    sizes = ["--requests", "60", "--warm-up", "100"]
    command = [sys.executable, "-m", "bench.reliability.soak", *sizes, "--csv", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    with open(table, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["wrong_outcomes"] == "0"
    assert int(row["selections"]) > 20  # it did ask about new slides
    for what in ("handles", "shm_files", "shm_mib", "unnamed_files"):
        assert float(row[f"{what}_end"]) <= float(row[f"{what}_warm"]), what
