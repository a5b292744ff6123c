"""`vllm-wsi train`: from question files to a checkpoint directory that `vllm serve` takes."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint

from vllm_wsi.errors import SettingsError
from vllm_wsi.files import new_folder
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.questions.items import QuestionError, SlideItem
from vllm_wsi.questions.reader import read_questions

from .batches import collate
from .dataset import SlideDataset
from .export_parts import export_parts
from .model import SparseLearnModel, set_trainable
from .settings import DataSettings, StageSettings, TrainSettings
from .sparselearn import SparseLearn
from .start_model import name_end_of_turn, start_model, with_lora
from .trainer import WEIGHTS, CsvLogCallback, ScheduleCallback, SparseLearnTrainer, load_trainable

logger = logging.getLogger(__name__)

Generators = Mapping[str, Callable[..., Sequence[SlideItem]]]
"""Makers of items by the `name` of a `generate` entry."""


def train(settings: TrainSettings, output: str | Path, generators: Generators | None = None) -> Path:
    """Runs all stages; a run that was stopped goes on where it was when it is started again.

    Args:
        output: directory; gets `log.csv`, `stages/` (what a resumed run needs) and, at the end, `checkpoint/` and, over
            a plain decoder, `trained/` (what was trained, without the decoder).

    Returns:
        The checkpoint directory.

    Raises:
        QuestionError: bad items, all named, before the first step.
        SettingsError: the output holds a finished run, or one of other settings.
    """
    output = Path(output)
    finished = output / "checkpoint"
    processes = PartialState(cpu=not torch.cuda.is_available())
    _claim(output, settings, processes)
    set_seed(settings.seed)
    model, tokenizer = start_model(settings.model, settings.seed)
    datasets = _checked_datasets(settings, ChatRenderer(tokenizer), model.config, generators or {})
    if processes.is_main_process:
        for stage, dataset in zip(settings.stages, datasets, strict=True):
            if (thinning := dataset.thinning()) is not None:
                logger.info("stage %s: %s", stage.name, thinning)
            for remark in dataset.encoder_remarks():
                logger.warning("stage %s: %s", stage.name, remark)
    previous: SparseLearn | None = None
    number = 0
    while number < len(settings.stages):
        stage = settings.stages[number]
        trained = run_stage(model, stage, datasets[number], tokenizer, output, number, settings, previous)
        if (
            trained.is_sharded
        ):  # only a shard of the weights is in memory: the model is built again from what the stages saved
            model, _ = start_model(settings.model, settings.seed)
            previous, number = None, 0
        else:
            previous, number = trained.sparselearn or previous, number + 1
    if processes.is_main_process:
        name_end_of_turn(model, tokenizer)
        export_parts(settings, model, tokenizer, output)
        with new_folder(finished) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    processes.wait_for_everyone()
    return finished


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
    if stage.lora is not None:
        model.language_model = with_lora(model.language_model, stage.lora)
    wrapped = SparseLearnModel(model, stage.sparselearn, previous)
    set_trainable(wrapped, set(stage.train))
    if final.is_dir():
        load_trainable(wrapped, final)
    else:
        trainer = make_trainer(wrapped, stage, dataset, tokenizer, directory, output / "log.csv", settings)
        last = get_last_checkpoint(str(directory)) if directory.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        is_main = trainer.is_world_process_zero()
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


def make_trainer(
    wrapped: SparseLearnModel,
    stage: StageSettings,
    dataset: SlideDataset,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    log: Path,
    settings: TrainSettings,
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
        "dataloader_num_workers": stage.workers,
        "remove_unused_columns": False,
        "disable_tqdm": not os.isatty(2),
        "use_cpu": not torch.cuda.is_available(),
    }
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    collator = partial(collate, slide_token_id=wrapped.model.config.slide_token_id, pad_token_id=pad)
    return SparseLearnTrainer(
        model=wrapped,
        args=_arguments(arguments | stage.trainer, stage.name),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[ScheduleCallback(wrapped), CsvLogCallback(wrapped, log, stage.name)],
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


def _checked_datasets(
    settings: TrainSettings, renderer: ChatRenderer, config: SparseWSIConfig, generators: Generators
) -> list[SlideDataset]:
    """One for each stage; all their bad items are named at once."""
    datasets: list[SlideDataset] = []
    problems: list[str] = []
    for number, stage in enumerate(settings.stages):
        if stage.sparselearn is not None and stage.sparselearn.num_slide_tokens != config.num_slide_tokens:
            found, wanted = stage.sparselearn.num_slide_tokens, config.num_slide_tokens
            raise SettingsError(
                f"stages: {stage.name}: num_slide_tokens: found {found}, wanted {wanted}, as the model keeps"
            )
        try:
            dataset = make_dataset(stage.data, renderer, config, settings.seed, generators)
        except QuestionError as error:
            problems += error.problems
            dataset = _dataset(error.items, stage.data, renderer, config, settings.seed)
        if stage.data.generate is None:
            is_seen = any(
                (earlier.data.questions, earlier.data.features) == (stage.data.questions, stage.data.features)
                for earlier in settings.stages[:number]
            )
            try:
                dataset.check(stage.data.read_first and not is_seen, settings.encoder_mismatch)
            except QuestionError as error:
                problems += error.problems
        datasets.append(dataset)
    if problems:
        raise QuestionError(list(dict.fromkeys(problems)))
    return datasets


def make_dataset(
    data: DataSettings, renderer: ChatRenderer, config: SparseWSIConfig, seed: int, generators: Generators
) -> SlideDataset:
    """The items of one stage's data, unread.

    Raises:
        QuestionError: names every bad item of all question files.
    """
    if data.generate is not None:
        options = dict(data.generate)
        name = options.pop("name", None)
        if name not in generators:
            raise SettingsError(f"generate: found name {name!r}, wanted one of {', '.join(generators) or 'none'}")
        make = generators[name]
        try:
            inspect.signature(make).bind(**options)
        except TypeError as error:
            raise SettingsError(f"generate: {name}: {error}") from error
        return _dataset(make(**options), data, renderer, config, seed)
    assert data.features is not None
    items: list[SlideItem] = []
    problems: list[str] = []
    for path in data.questions:
        try:
            items += read_questions(path, data.features)
        except QuestionError as error:
            items += error.items
            problems += error.problems
    if problems:
        raise QuestionError(problems, items)
    return _dataset(items, data, renderer, config, seed)


def _dataset(
    items: Sequence[SlideItem], data: DataSettings, renderer: ChatRenderer, config: SparseWSIConfig, seed: int
) -> SlideDataset:
    return SlideDataset(items, renderer, config, data.max_patches, data.stretch_positions, data.mix_positions, seed)


def _claim(output: Path, settings: TrainSettings, processes: PartialState) -> None:
    """Makes the output directory this run's own: all processes look, the main one writes."""
    if (output / "checkpoint").exists():
        raise SettingsError(f"{output}: found a finished run, wanted a new directory")
    text, mine = settings.model_dump_json(indent=2), output / "settings.json"
    if mine.exists() and mine.read_text() != text:
        raise SettingsError(f"{output}: found a run of other settings (settings.json), wanted a new directory")
    processes.wait_for_everyone()
    if processes.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        mine.write_text(text)
