"""Several epochs of a run: other patches in each, the same after a stop, in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.slides import write_features
from vllm_wsi.training.dataset import SlideDataset
from vllm_wsi.training.settings import TrainSettings, load_settings
from vllm_wsi.training.train import train

from .stopping import stopped_at

pytestmark = pytest.mark.slow
D, N, MOST, ITEMS = 8, 90, 10, 8


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path)


def make_run(tmp_path: Path) -> Path:
    """A folder with config.yaml: eight questions about four slides, three epochs of two steps in two processes."""
    features = tmp_path / "features"
    features.mkdir()
    for number in range(4):
        x = np.random.default_rng(number).standard_normal((N, D)).astype(np.float32)
        write_features(features / f"{number}.safetensors", x)
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A sarcoma."}]
    rows = [{"id": str(n), "image": [f"{n % 4}.csv"], "conversations": talk} for n in range(ITEMS)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    tiny = TinySettings(feature_dim=D, hidden_size=32, num_layers=1, scorer_hidden_size=8, num_slide_tokens=4)
    init_checkpoint(tmp_path / "start", tiny)
    stage = {
        "name": "scorer",
        "data": {"questions": ["q.json"], "features": "features", "max_patches": MOST, "stretch_positions": 300},
        "train": ["scorer", "projector"],
        "sparselearn": {"num_slide_tokens": 4, "k_start": 4},
        "steps": 6,
        "batch_size": 2,
        "save_steps": 1,
        "warmup_steps": 1,
        "workers": 1,
        "learning_rate": {"scorer": 1e-2, "denoiser": 1e-2, "projector": 1e-2},
        "trainer": {"use_cpu": True},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"checkpoint": "start"}, "stages": [stage]}))
    return tmp_path


def settings(run: Path, **changes) -> TrainSettings:
    found = load_settings(run / "config.yaml")
    found.stages[0] = found.stages[0].model_copy(update=changes)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_trainer_reads_other_rows_in_each_epoch(run, monkeypatch):
    read: list[tuple[int, tuple[int, ...]]] = []
    get = SlideDataset.__getitem__

    def get_and_note(self, number):
        item = get(self, number)
        read.append((number, tuple(self.rows_read)))
        return item

    def rows_of(self, source, rng):
        slide = before(self, source, rng)
        self.rows_read = slide.features[:, 0].tolist()
        return slide

    before = SlideDataset._slide
    monkeypatch.setattr(SlideDataset, "_slide", rows_of)
    monkeypatch.setattr(SlideDataset, "__getitem__", get_and_note)
    train(settings(run, workers=0, batch_size=4), run / "out")
    assert len(read) == 3 * ITEMS
    assert sorted(number for number, _ in read[:ITEMS]) == list(range(ITEMS))
    assert len({rows for _, rows in read}) == 3 * ITEMS


@pytest.mark.parametrize("step", [3, 4])  # within an epoch, and between two
def test_a_run_stopped_in_a_later_epoch_goes_on_to_the_same_bits(run, step):
    asked = settings(run, batch_size=4)
    train(asked, run / "whole")
    with stopped_at(step):
        train(asked, run / "stopped")
    train(asked, run / "stopped")
    assert_same_weights(run / "stopped", run / "whole")


def test_the_number_of_workers_changes_no_bit(run):
    for workers in (0, 2):
        train(settings(run, workers=workers), run / f"by-{workers}")
    assert_same_weights(run / "by-0", run / "by-2")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, what the main process found, what the other found): all that `two_processes.py` does."""
    folder = make_run(tmp_path_factory.mktemp("two"))
    write_features(folder / "features" / "4.safetensors", np.full((3, D), np.nan, np.float32))
    rows = json.loads((folder / "q.json").read_text())
    (folder / "bad.json").write_text(json.dumps([*rows, rows[0] | {"image": ["4.csv"]}]))
    (folder / "bad.yaml").write_text((folder / "config.yaml").read_text().replace("q.json", "bad.json"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("two_processes.py")), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, *(json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))


def test_what_the_main_process_finds_or_fails_with_reaches_the_other(two):
    _, main, other = two
    assert main["result"] == other["result"] == ["by process 0"]
    assert (main["calls"], other["calls"]) == (["slow"], [])
    assert main["error"] == "OSError: the disk is full"
    assert other["error"] == "SetupError: the disk is full"
    assert main["after"] == other["after"] == 7


def test_two_processes_resume_in_the_order_and_with_the_rows_of_their_epoch(two):
    folder, main, other = two
    assert sorted(main["opened"]) == [f"{number}.safetensors" for number in range(4)]
    assert other["opened"] == []  # the look at the slides is the main process's
    seen = [*main["seen"], *other["seen"]]  # of each slide of each batch, the sum of the features that were taken
    assert len(set(seen)) == len(seen) == 3 * ITEMS
    assert_same_weights(folder / "stopped", folder / "whole")


def test_a_broken_slide_ends_both_processes_with_its_sentence(two):
    _, main, other = two
    assert main["broken"] == other["broken"]
    assert "QuestionError" in main["broken"]
    assert "4.safetensors: found no patch with finite features" in main["broken"]
