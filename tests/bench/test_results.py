"""The files in `bench/results/`: each benchmark can append to its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CHECK = """
import importlib, pkgutil, bench
from bench.common.record import check_header

for found in pkgutil.walk_packages(bench.__path__, "bench."):
    module = importlib.import_module(found.name)
    if hasattr(module, "CSV") and hasattr(module, "COLUMNS"):
        check_header(module.CSV, module.COLUMNS)
        print(module.CSV.name, module.CSV.exists())
"""


def test_each_benchmark_appends_rows_with_the_columns_that_its_file_has():
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True") >= 15
