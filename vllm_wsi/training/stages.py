"""One stage of a training run: a part of the model learns, what it learned is saved, and a stopped stage goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from vllm_wsi.errors import SettingsError
from vllm_wsi.files import new_folder
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration

from .batches import collate
from .dataset import SlideDataset
from .grouping import GroupedDataset
from .hard_selection import HardSelection
from .loading import EpochCallback, num_workers
from .model import SparseLearnModel, set_trainable
from .settings import StageSettings, TrainSettings
from .sparselearn import SparseLearn
from .start_model import with_lora
from .trainer import (
    WEIGHTS,
    CsvLogCallback,
    NoiseSeedCallback,
    ScheduleCallback,
    SparseLearnTrainer,
    last_whole_checkpoint,
    load_trainable,
)

logger = logging.getLogger(__name__)


class TrainedStage(NamedTuple):
    """What a stage leaves in memory beside the model."""

    sparselearn: SparseLearn | None  # the gate and its trained denoiser; a checkpoint does not hold them
    is_sharded: bool  # by FSDP or DeepSpeed: neither the model nor the gate is whole


def run_stage(
    model: SparseWSIForConditionalGeneration,
    stage: StageSettings,
    dataset: SlideDataset,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    number: int,
    settings: TrainSettings,
    previous: SparseLearn | None = None,
) -> TrainedStage:
    """Trains `model` in place, or restores what this stage gave before. Of several processes all call it.

    Args:
        previous: of the last stage that had one; a denoiser of the same kind goes on learning.
    """
    directory = output / "stages" / f"{number}-{stage.name}"
    final = directory / "final"
    is_sharded = False
    set_seed(settings.seed)  # new weights below are the same, whether this run made the stages before or found them
    is_hard = stage.selection == "hard"
    hears = model.config.scorer["kind"] == "question"  # else the table would be held, and sent to workers, for nothing
    embeddings = model.get_input_embeddings().weight if hears else None
    config = model.config
    dataset.selection = None
    if is_hard:
        dataset.selection = HardSelection(model.scorer, config.num_slide_tokens, embeddings, config.summary_tokens)
    if stage.lora is not None:
        model.language_model = with_lora(model.language_model, stage.lora)
    wrapped = SparseLearnModel(model, stage.sparselearn, previous)
    set_trainable(wrapped, set(stage.train))
    if final.is_dir():
        load_trainable(wrapped, final)
    else:
        log = output / "log.csv"
        trainer = make_trainer(wrapped, stage, dataset, tokenizer, directory, log, settings, number)
        is_main = trainer.is_world_process_zero()
        last = last_whole_checkpoint(directory, is_main)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        with new_folder(final, is_main) as folder:
            trainer.save_model(str(folder))  # gathers in all processes, writes in the main one
            if is_main and not (folder / WEIGHTS).exists():
                raise SettingsError(f"{folder}: found no whole weights, wanted FSDP to use FULL_STATE_DICT")
        trainer.accelerator.wait_for_everyone()
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not is_sharded:
        if stage.lora is not None:
            model.language_model = model.language_model.merge_and_unload()
        model.requires_grad_(True)
    return TrainedStage(wrapped.sparselearn, is_sharded)


def refuse_unseen_summary(stages: Sequence[StageSettings], config: SparseWSIConfig) -> None:
    """Raises SettingsError where a model would be served summary tokens that it did not learn to read last."""
    if config.summary_tokens and stages[-1].selection != "hard":
        raise SettingsError(
            f"stages: {stages[-1].name}: selection: found {stages[-1].selection} in the last stage of a model with "
            f"{config.summary_tokens} summary_tokens, wanted hard, which alone shows them"
        )


def refuse_beside_questions(stages: Sequence[StageSettings], model: SparseWSIForConditionalGeneration) -> None:
    """Raises SettingsError for what cannot be where the scorer hears the question."""
    if model.config.scorer["kind"] == "question":
        for stage in stages:
            _refuse_beside_questions(stage)


def _refuse_beside_questions(stage: StageSettings) -> None:
    if stage.questions_per_sequence > 1:
        raise SettingsError(
            f"stages: {stage.name}: questions_per_sequence: found {stage.questions_per_sequence} beside a scorer that "
            "hears the question, wanted 1: each question has patches of its own"
        )
    targets = [] if stage.lora is None else stage.lora.target_modules
    named = [targets] if isinstance(targets, str) else targets  # a pattern, or names
    changes = [part for part in (*stage.train, *named) if part == "decoder" or "embed" in part]
    if stage.selection == "hard" and changes:
        raise SettingsError(
            f"stages: {stage.name}: found {', '.join(changes)} to train in a hard stage beside a scorer that hears the "
            "question, wanted the decoder's token embeddings as they are: its queries are made of them"
        )


def refuse_rounded_steps(stages: Sequence[StageSettings], model: SparseWSIForConditionalGeneration) -> None:
    """Raises SettingsError where a decoder of half precision is to learn: most steps of Adam round to nothing in it."""
    for stage in stages:
        if "decoder" in stage.train and model.dtype != torch.float32:
            raise SettingsError(
                f"stages: {stage.name}: train: found a decoder in {str(model.dtype).removeprefix('torch.')}, wanted "
                "float32 (model: dtype), or lora, whose adapters are float32"
            )


def make_trainer(
    wrapped: SparseLearnModel,
    stage: StageSettings,
    dataset: SlideDataset,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    log: Path,
    settings: TrainSettings,
    number: int,
) -> SparseLearnTrainer:
    arguments: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size,
        "learning_rate": max(stage.learning_rate.values()),
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": stage.min_lr_rate},
        "warmup_steps": stage.warmup_steps,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "adam_beta2": 0.98,
        "save_steps": stage.save_steps,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": settings.report_to or "none",
        "seed": settings.seed,
        "dataloader_num_workers": num_workers(stage.workers),
        "remove_unused_columns": False,
        "disable_tqdm": not os.isatty(2),
        "use_cpu": not torch.cuda.is_available(),
    }
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = partial(collate, slide_token_id=wrapped.model.config.slide_token_id, pad_token_id=pad)
    train_dataset: SlideDataset | GroupedDataset = dataset
    if stage.questions_per_sequence > 1:
        train_dataset = GroupedDataset(dataset, stage.questions_per_sequence, settings.seed)
        if PartialState().is_main_process:
            logger.info("stage %s: %s", stage.name, train_dataset.summary())
    return SparseLearnTrainer(
        model=wrapped,
        args=_arguments(arguments | stage.trainer, stage.name),
        train_dataset=train_dataset,
        data_collator=collator,
        callbacks=[
            NoiseSeedCallback(settings.seed, number),
            EpochCallback(train_dataset),
            ScheduleCallback(wrapped),
            CsvLogCallback(wrapped, log, stage.name),
        ],
        learning_rates={str(part): rate for part, rate in stage.learning_rate.items()},
    )


def _arguments(values: dict[str, Any], stage: str) -> TrainingArguments:
    try:
        arguments = TrainingArguments(**values)
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # tells whether its package is there
    except (TypeError, ValueError, RuntimeError, ImportError) as error:  # a name, a value, a package that is missing
        raise SettingsError(f"stages: {stage}: trainer, report_to: {error}") from error
    return arguments
