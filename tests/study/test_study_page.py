"""The pages of the committed studies say what their rows say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("study", "module"), [("study", "study_tables"), ("tissue", "tissue_page"), ("kather", "kather_page")]
)
def test_tables_on_the_page_are_those_of_the_rows_and_no_interval_of_them_has_no_width(study, module, tmp_path):
    code = (
        f"import shutil, sys; from pathlib import Path; from bench.study import {module} as page;"
        "page.PAGE = Path(shutil.copy(page.PAGE, sys.argv[1])); page.main();"
        "print(page.PAGE.read_text(), end='')"
    )
    text = (ROOT / f"bench/results/{study}/README.md").read_text()
    command = [sys.executable, "-c", code, str(tmp_path / "README.md")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout == text
    intervals = re.findall(r"\[(-?\d\.\d+), (-?\d\.\d+)\]", text)
    assert len(intervals) > 10
    assert all(low != high for low, high in intervals)
