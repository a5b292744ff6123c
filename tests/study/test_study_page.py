"""The page of the committed study says what its rows say."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "bench/results/study/README.md"


def test_tables_on_the_page_are_those_of_the_rows_and_no_interval_of_them_has_no_width(tmp_path):
    code = (
        "import shutil, sys; from pathlib import Path; from bench.study import study_tables;"
        "study_tables.PAGE = Path(shutil.copy(study_tables.PAGE, sys.argv[1])); study_tables.main();"
        "print(study_tables.PAGE.read_text(), end='')"
    )
    text = PAGE.read_text()
    command = [sys.executable, "-c", code, str(tmp_path / "README.md")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout == text
    intervals = re.findall(r"\[(-?\d\.\d+), (-?\d\.\d+)\]", text)
    assert len(intervals) > 50
    assert all(low != high for low, high in intervals)
