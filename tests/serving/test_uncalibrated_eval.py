"""`vllm-wsi eval` of a checkpoint without a calibration: no number is said, and the server is asked for them once."""

import csv

import pytest

from vllm_wsi.benchmark.results import read_results
from vllm_wsi.cli.app import main

from .conftest import KEY, make_slide

pytestmark = pytest.mark.server


def test_a_server_without_a_calibration_is_asked_once(shared_server, shared_folder, tmp_path, monkeypatch):
    folder = shared_folder / "uncalibrated"
    folder.mkdir()
    for number in range(3):
        make_slide(folder / f"{number}.safetensors", 60, seed=number)
    rows = [(number % 3, f"Question {number}?", *"xy", "A") for number in range(6)]
    with open(tmp_path / "q.csv", "w", newline="") as file:
        csv.writer(file).writerows([("Slide", "Question", "A", "B", "Answer"), *rows])
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    log = len(shared_server.log_path.read_text())
    args = ["eval", "--task", "csv", "--data", str(tmp_path / "q.csv"), "--features", str(folder), "--max-tokens", "4"]
    args += ["--out", str(tmp_path / "out"), "--baselines", "blind", "--endpoint", shared_server.api]
    assert main(args) == 0
    _, found = read_results(tmp_path / "out/generate.slide.jsonl")
    assert [row.status for row in found.values()] == ["answered"] * 6
    assert all(row.sufficiency is row.in_distribution is row.confidence is None for row in found.values())
    # With the question, which this scorer does not hear, and without.
    asked = shared_server.log_path.read_text()[log:]
    assert [asked.count(f'POST /v1/wsi/select HTTP/1.1" {status}') for status in (400, 200)] == [1, 1]
    assert "trusted" not in (tmp_path / "out/summary.md").read_text()
