"""What `test_epochs.py` runs in two processes: `torchrun ... two_processes.py FOLDER`; each writes FOLDER/RANK.json."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from stopping import stopped_at  # beside this script

from vllm_wsi.questions.finder import FeaturePath
from vllm_wsi.training import slide_check
from vllm_wsi.training.settings import load_settings
from vllm_wsi.training.slide_check import on_main_process
from vllm_wsi.training.train import train
from vllm_wsi.training.trainer import SparseLearnTrainer


def share() -> dict:
    """A slow result, and a failure, of the main process's work."""
    processes = PartialState(cpu=True)
    slide_check.SIGN_OF_LIFE = 0.2
    calls = []

    def slow() -> list[str]:
        calls.append("slow")
        time.sleep(1.0)
        return [f"by process {processes.process_index}"]

    def fails() -> None:
        raise OSError("the disk is full")

    found = {"result": on_main_process(processes, slow), "calls": calls}
    try:
        on_main_process(processes, fails)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["after"] = on_main_process(processes, lambda: 7)
    return found


def resume(folder: Path) -> dict:
    """A run without a stop, and one that is stopped in its second epoch and started again."""
    PartialState(cpu=True)
    opened: list[str] = []
    before = FeaturePath.open

    def open_and_note(self: FeaturePath):
        if not (folder / "whole" / "stages").exists():  # before the first step
            opened.append(self.name)
        return before(self)

    FeaturePath.open = open_and_note  # type: ignore[method-assign]
    seen: list[float] = []
    training_step = SparseLearnTrainer.training_step

    def train_and_note(self, model, inputs, *arguments):
        seen.extend(inputs["features"].sum(dim=(1, 2)).tolist())
        return training_step(self, model, inputs, *arguments)

    settings = load_settings(folder / "config.yaml")
    SparseLearnTrainer.training_step = train_and_note  # type: ignore[method-assign]
    train(settings, folder / "whole")
    SparseLearnTrainer.training_step = training_step  # type: ignore[method-assign]
    with stopped_at(3):
        train(settings, folder / "stopped")
    train(settings, folder / "stopped")
    return {"opened": opened, "seen": seen}


def bad(folder: Path) -> dict:
    """A run with a broken slide."""
    try:
        train(load_settings(folder / "bad.yaml"), folder / "bad")
    except Exception as error:
        return {"broken": f"{type(error).__name__}: {error}"}
    return {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    said = share() | resume(where) | bad(where)
    (where / f"{os.environ['RANK']}.json").write_text(json.dumps(said))
