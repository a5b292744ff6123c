"""The commands as a user types them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_wsi.cli import main
from vllm_wsi.slides import open_features


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "vllm-wsi"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "small"
    made = run("init-checkpoint", str(path), "--feature-dim", "512", "--hidden-size", "64")
    assert made.returncode == 0, made.stderr
    assert "random weights from seed 0" in made.stdout
    return path


def test_select_prints_the_kept_patches_of_the_real_slide(checkpoint, shared_data):
    file = shared_data / "features/mopadi_TCGA-AD-6964/features.h5"
    done = run("select", str(file), "--checkpoint", str(checkpoint), "-k", "5")
    found = json.loads(done.stdout)
    with open_features(file) as slide:
        coords = slide.read_coords()
    assert found["num_patches"] == 777
    assert found["indices"] == sorted(set(found["indices"]))
    assert len(found["indices"]) == 5
    assert found["coords"] == [coords[i].tolist() for i in found["indices"]]


def test_select_twice_prints_the_same(checkpoint, shared_data):
    file = shared_data / "features/mopadi_TCGA-AD-6964/features.h5"
    printed = [run("select", str(file), "--checkpoint", str(checkpoint)).stdout for _ in range(2)]
    assert printed[0] == printed[1]


def test_doctor_names_what_the_real_slide_holds(shared_data, capsys):
    assert main(["doctor", str(shared_data / "features/mopadi_TCGA-AD-6964/features.h5")]) == 0
    printed = capsys.readouterr().out
    assert "feats: 777 patches x 512, float32" in printed
    assert "level-0 pixels" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["select", "nosuch.h5", "--checkpoint", "x"], "nosuch.h5: found no readable file"),
        (["init-checkpoint", ".", "--feature-dim", "8"], "wanted a new directory"),
        (["demo", "--slide", "nosuch.h5"], "nosuch.h5: found no readable file"),
    ],
)
def test_errors_are_one_sentence_and_exit_with_1(arguments, sentence, capsys):
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_help_imports_neither_torch_nor_vllm():
    code = """
import sys
from vllm_wsi.cli import main
try:
    main(["--help"])
except SystemExit:
    print([m for m in ("torch", "vllm", "numpy") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.server
def test_demo_answers_right_about_a_virtual_slide_and_shows_that_the_evidence_was_kept():
    done = run("demo")
    assert done.returncode == 0, done.stderr
    assert "100,000 patches x 64" in done.stdout
    assert "random weights" not in done.stdout
    assert done.stdout.count(": right") == 2
    kept, evidence = re.search(r"(\d+) of the (\d+) patches that decide the answer are shown", done.stdout).groups()
    assert 1 <= int(kept) <= int(evidence) <= 12


@pytest.mark.server
def test_demo_answers_about_the_real_slide_with_evidence_and_times(shared_data):
    done = run("demo", "--slide", str(shared_data / "features/mopadi_TCGA-AD-6964/features.h5"))
    assert done.returncode == 0, done.stderr
    assert "777 patches x 512" in done.stdout
    assert "random weights" in done.stdout
    assert "32 of 777 patches" in done.stdout
    rows = {line[:38].strip(): line[38:].split() for line in done.stdout.splitlines()}
    new, again = map(float, rows["read"])
    assert new > 0
    assert again == 0
    assert float(rows["prefill"][0]) > 0
    assert float(rows["decode"][0]) > 0
