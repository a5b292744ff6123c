"""`transformers.Trainer` for the soft path: rates for each part, the gate's schedule, small resumable checkpoints."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vllm_wsi.errors import SettingsError
from vllm_wsi.files import write_csv

from .model import SparseLearnModel, trainable_state

logger = logging.getLogger(__name__)

WEIGHTS = "trainable.safetensors"
LOG_COLUMNS = (
    "stage",
    "step",
    "loss",
    "learning_rate",
    "tau",
    "num_slide_tokens",
    "alpha_of_top",
    "alpha_max",
    "tokens",
)


class SparseLearnTrainer(Trainer):
    """Trains a `SparseLearnModel`.

    Args:
        learning_rates: for scorer, denoiser, projector, decoder and lora, as far as they learn.
    """

    def __init__(self, *args: Any, learning_rates: dict[str, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._learning_rates = learning_rates
        # The parameters' names before FSDP or DeepSpeed changes them.
        self._names = tuple(trainable_state(self.model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if getattr(self, "optimizer", None) is None:
            decaying = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((part_of(name), name in decaying), []).append(parameter)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer(
                [
                    {
                        "params": parameters,
                        "lr": self._learning_rates[part],
                        "weight_decay": self.args.weight_decay * decays,
                    }
                    for (part, decays), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The parameters under training alone: a frozen decoder of gigabytes is not written again and again."""
        if state_dict is None:
            state_dict = self.accelerator.unwrap_model(self.model).state_dict()
        elif missing := [name for name in self._names if name not in state_dict]:
            raise SettingsError(
                f"{output_dir}: found no gathered {missing[0]}, wanted the whole state on the main process"
            )
        output = Path(output_dir or self.args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        save_file({name: state_dict[name].detach().clone().contiguous() for name in self._names}, output / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            raise SettingsError(
                f"{resume_from_checkpoint}: found a stage that was stopped under FSDP, wanted its directory removed, "
                "so that the stage starts again"
            )
        load_trainable(self.model if model is None else model, Path(resume_from_checkpoint))


def load_trainable(model: nn.Module, directory: Path) -> None:
    """Restores what `SparseLearnTrainer` saved."""
    state = load_file(directory / WEIGHTS)
    wanted = trainable_state(model)
    if state.keys() != wanted.keys():
        raise SettingsError(f"{directory}: found the parameters of another stage, wanted those of this one")
    model.load_state_dict(state, strict=False)


def last_whole_checkpoint(directory: Path, is_main: bool = True) -> Path | None:
    """The newest checkpoint that the Trainer wrote to its end; None where there is none.

    The Trainer fills a checkpoint under its final name, so a run that is killed meanwhile leaves a part of one.

    Args:
        directory: of a stage; need not exist.
        is_main: of several processes, the one that removes newer checkpoints, which are not whole.
    """
    found = ((path.name.rpartition("-")[2], path) for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    for _, path in sorted(((int(step), path) for step, path in found if step.isdecimal()), reverse=True):
        if _is_whole(path):
            return path
        if is_main:
            logger.warning("%s: found a checkpoint that was not written to its end; it is removed", path)
            shutil.rmtree(path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether its last file is there and whole."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return True


def part_of(name: str) -> str:
    """The part of the learning rates that a parameter of `SparseLearnModel` belongs to."""
    if name.startswith("sparselearn."):
        return "denoiser"
    part = name.removeprefix("model.").partition(".")[0]
    if part == "language_model":
        return "lora" if "lora_" in name else "decoder"
    return part


class ScheduleCallback(TrainerCallback):
    """Sets tau and K before every step, from the step's number: also after a resume."""

    def __init__(self, model: SparseLearnModel) -> None:
        self._sparselearn = model.sparselearn

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._sparselearn is not None:
            self._sparselearn.set_progress(state.global_step / state.max_steps)


class NoiseSeedCallback(TrainerCallback):
    """Gives every process other random numbers when a stage begins: the noise of the gate, and dropout.

    New weights need the same seed in all processes; the same noise for the slides of all of them would be less noise.
    A resumed stage takes its saved random state instead, which the Trainer restores later; where there is none, because
    the number of processes changed, the step is in the seed, so that the noise of the first steps does not return.
    """

    def __init__(self, seed: int, stage: int) -> None:
        self._seed, self._stage = seed, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        of = np.random.SeedSequence([self._seed, self._stage, args.process_index, state.global_step])
        set_seed(int(of.generate_state(1)[0]))


class CsvLogCallback(TrainerCallback):
    """Appends what is logged to a CSV file, with how sharp the selection has become.

    A stage that resumes from a saved step first removes the rows of later steps, because these steps run again.
    """

    def __init__(self, model: SparseLearnModel, path: Path, stage: str) -> None:
        self._model, self._path, self._stage = model, path, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self._path.exists():
            return
        with open(self._path, newline="") as file:
            rows = list(csv.DictReader(file))
        kept = [row for row in rows if row["stage"] != self._stage or int(row["step"]) <= state.global_step]
        if len(kept) == len(rows):
            return
        write_csv(self._path, kept, LOG_COLUMNS)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        row: dict[str, Any] = {"stage": self._stage, "step": state.global_step}
        row |= {name: f"{float(logs[name]):.6g}" for name in ("loss", "learning_rate") if name in logs}
        row |= self._gate()
        is_new = not self._path.exists()
        with open(self._path, "a", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def _gate(self) -> dict[str, Any]:
        """Means over the last batch: alpha of the K best, the largest, and how many patches the mass lies on."""
        sparselearn, alpha = self._model.sparselearn, self._model.last_alpha
        if sparselearn is None or alpha is None:
            return {}
        num_slide_tokens = int(sparselearn.num_slide_tokens)
        best = alpha.topk(min(num_slide_tokens, alpha.shape[-1])).values
        effective = alpha.sum(dim=-1).square() / alpha.square().sum(dim=-1)
        return {
            "tau": f"{float(sparselearn.tau):.4g}",
            "num_slide_tokens": num_slide_tokens,
            "alpha_of_top": f"{float(best.mean()):.4g}",
            "alpha_max": f"{float(best[:, 0].mean()):.4g}",
            "tokens": f"{float(effective.mean()):.4g}",
        }
