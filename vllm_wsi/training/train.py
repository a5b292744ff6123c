"""`vllm-wsi train`: from question files to a checkpoint directory that `vllm serve` takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from vllm_wsi.chat import ChatEncoder
from vllm_wsi.config import SLIDE_TOKEN, SparseWSIConfig
from vllm_wsi.init_checkpoint import new_model
from vllm_wsi.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.questions import SlideItem, read_questions

from .batches import SlideDataset, collate
from .model import SparseLearnModel, set_trainable
from .settings import DataSettings, LoraSettings, ModelSettings, StageSettings, TrainSettings
from .trainer import CsvLogCallback, ScheduleCallback, SparseLearnTrainer, load_trainable

Generators = Mapping[str, Callable[..., Sequence[SlideItem]]]
"""Makers of items by the `name` of a `generate` entry."""


def train(settings: TrainSettings, output: str | Path, generators: Generators | None = None) -> Path:
    """Runs all stages; a run that was stopped goes on where it was when it is started again.

    Args:
        output: directory; gets `log.csv`, `stages/` (what a resumed run needs) and, at the end, `checkpoint/`.

    Returns:
        The checkpoint directory.

    Raises:
        QuestionError: bad items, all named, before the first step.
        ValueError: the output holds a finished run, or one of other settings.
    """
    output = Path(output)
    finished = output / "checkpoint"
    _claim(output, settings)
    set_seed(settings.seed)
    model, tokenizer = start_model(settings.model, settings.seed)
    encoder = ChatEncoder(tokenizer)
    datasets = []
    for stage in settings.stages:
        if stage.sparselearn is not None and stage.sparselearn.num_kept != model.config.num_slide_tokens:
            found, wanted = stage.sparselearn.num_kept, model.config.num_slide_tokens
            raise ValueError(f"stages: {stage.name}: num_kept: found {found}, wanted {wanted}, as the model keeps")
        dataset = make_dataset(stage.data, encoder, model.config, settings.seed, generators or {})
        if stage.data.generate is None:
            dataset.check()
        datasets.append(dataset)
    for number, (stage, dataset) in enumerate(zip(settings.stages, datasets, strict=True)):
        run_stage(model, stage, dataset, tokenizer, output, number, settings)
    partial_path = output / "checkpoint.partial"
    shutil.rmtree(partial_path, ignore_errors=True)
    model.save_pretrained(partial_path)
    tokenizer.save_pretrained(partial_path)
    os.rename(partial_path, finished)
    return finished


def run_stage(
    model: SparseWSIForConditionalGeneration,
    stage: StageSettings,
    dataset: SlideDataset,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    number: int,
    settings: TrainSettings,
) -> None:
    """Trains `model` in place, or restores what this stage gave before."""
    directory = output / "stages" / f"{number}-{stage.name}"
    if stage.lora is not None:
        model.language_model = with_lora(model.language_model, stage.lora)
    wrapped = SparseLearnModel(model, stage.sparselearn)
    set_trainable(wrapped, set(stage.train))
    if (directory / "final").is_dir():
        load_trainable(wrapped, directory / "final")
    else:
        trainer = make_trainer(wrapped, stage, dataset, tokenizer, directory, output / "log.csv", settings)
        last = get_last_checkpoint(str(directory)) if directory.is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model(str(directory / "final.partial"))
        os.rename(directory / "final.partial", directory / "final")
    if stage.lora is not None:
        model.language_model = model.language_model.merge_and_unload()
    model.requires_grad_(True)


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
        args=TrainingArguments(**(arguments | stage.trainer)),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[ScheduleCallback(wrapped), CsvLogCallback(wrapped, log, stage.name)],
        learning_rates={str(part): rate for part, rate in stage.learning_rate.items()},
    )


def make_dataset(
    data: DataSettings, encoder: ChatEncoder, config: SparseWSIConfig, seed: int, generators: Generators
) -> SlideDataset:
    """The items of one stage's data, unread."""
    if data.generate is not None:
        options = dict(data.generate)
        name = options.pop("name", None)
        if name not in generators:
            raise ValueError(f"generate: found name {name!r}, wanted one of {', '.join(generators) or 'none'}")
        items = generators[name](**options)
    else:
        assert data.features is not None
        items = [item for path in data.questions for item in read_questions(path, data.features)]
    return SlideDataset(items, encoder, config, data.max_patches, data.stretch_positions, data.mix_positions, seed)


def start_model(
    settings: ModelSettings, seed: int
) -> tuple[SparseWSIForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model that training starts from, and its tokenizer."""
    if settings.new is not None:
        return new_model(**({"seed": seed} | settings.new))
    if settings.checkpoint is not None:
        model = SparseWSIForConditionalGeneration.from_pretrained(settings.checkpoint, revision=settings.revision)
        return model, AutoTokenizer.from_pretrained(settings.checkpoint, revision=settings.revision)
    assert settings.decoder is not None
    assert settings.feature_dim is not None
    dtype = getattr(torch, settings.dtype)
    decoder = AutoModelForCausalLM.from_pretrained(settings.decoder, revision=settings.revision, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(settings.decoder, revision=settings.revision)
    tokenizer.add_special_tokens({"additional_special_tokens": [SLIDE_TOKEN]}, replace_extra_special_tokens=False)
    if len(tokenizer) > decoder.get_input_embeddings().num_embeddings:
        decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    config = SparseWSIConfig(
        text_config=decoder.config,
        feature_dim=settings.feature_dim,
        encoder=settings.encoder,
        num_slide_tokens=settings.num_slide_tokens,
        scorer=settings.scorer,
        projector=settings.projector,
        position_ids=settings.position_ids,
        max_slide_positions=settings.max_slide_positions,
        slide_token_id=tokenizer.convert_tokens_to_ids(SLIDE_TOKEN),
    )
    model = SparseWSIForConditionalGeneration(config, language_model=decoder)
    model.generation_config = decoder.generation_config
    return model, tokenizer


def with_lora(decoder: Any, settings: LoraSettings) -> Any:
    """The decoder with new adapters, which alone would learn in it."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        decoder,
        LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def _claim(output: Path, settings: TrainSettings) -> None:
    """Makes the output directory this run's own."""
    if (output / "checkpoint").exists():
        raise ValueError(f"{output}: found a finished run, wanted a new directory")
    output.mkdir(parents=True, exist_ok=True)
    text, mine = settings.model_dump_json(indent=2), output / "settings.json"
    if mine.exists() and mine.read_text() != text:
        raise ValueError(f"{output}: found a run of other settings (settings.json), wanted a new directory")
    mine.write_text(text)
