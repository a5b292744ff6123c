"""`vllm-wsi train`: from question files to a checkpoint directory that `vllm serve` takes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, set_seed

from vllm_wsi.errors import SettingsError, WsiError
from vllm_wsi.files import new_folder
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.questions.items import QuestionError, SlideItem
from vllm_wsi.questions.reader import read_questions

from .dataset import SlideDataset
from .export_parts import export_parts
from .settings import SCORER_RUN, DataSettings, ModelSettings, TrainSettings
from .shared_prefix import attend_to_shared_prefix
from .slide_check import SlideMemory, on_main_process
from .sparselearn import SparseLearn
from .stages import refuse_beside_questions, refuse_rounded_steps, refuse_unseen_summary, run_stage
from .start_model import name_end_of_turn, start_model

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"  # of a run's directory
SETTINGS = "settings.json"  # of a run's directory: what it was started with
REMEMBERED_SLIDES = "slides.json"  # of a run's directory: what the look at the slides found

Generators = Mapping[str, Callable[..., Sequence[SlideItem]]]
"""Makers of items by the `name` of a `generate` entry."""


def train(settings: TrainSettings, output: str | Path, generators: Generators | None = None) -> Path:
    """Runs all stages; a run that was stopped goes on where it was when it is started again.

    Args:
        output: directory; gets `log.csv`, `slides.json` (which slides were found good), `stages/` (what a resumed run
            needs) and, at the end, `checkpoint/` and, over a plain decoder, `trained/` (what was trained, without the
            decoder). `scorer/` is the same of a `scorer_run`.

    Returns:
        The checkpoint directory.

    Raises:
        QuestionError: bad items, all named, before the first step.
        SettingsError: the output holds a finished run, or one of other settings.
    """
    output = Path(output)
    finished = output / CHECKPOINT
    processes = PartialState(cpu=not torch.cuda.is_available())
    _claim(output, settings, processes)
    try:
        start, model, tokenizer, datasets = _checked_start(settings, output, generators or {}, processes)
    except (WsiError, OSError):  # a file of questions that is not there is an OSError
        if processes.is_main_process:
            _unclaim(output)
        raise
    if processes.is_main_process:
        slow = (said for dataset in datasets if (said := dataset.slow_reading()) is not None)
        if (said := next(slow, None)) is not None:
            logger.warning("%s", said)
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
            model, _ = start_model(start, settings.seed)
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


class _Start(NamedTuple):
    """What a run begins with."""

    settings: ModelSettings
    model: SparseWSIForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    datasets: list[SlideDataset]  # of each stage


def _checked_start(settings: TrainSettings, output: Path, generators: Generators, processes: PartialState) -> _Start:
    """Raises WsiError for whatever can be told before the first step."""
    start = _with_scorer(settings, output / SCORER_RUN, generators)
    set_seed(settings.seed)
    model, tokenizer = start_model(start, settings.seed)
    refuse_rounded_steps(settings.stages, model)
    refuse_beside_questions(settings.stages, model)
    refuse_unseen_summary(settings.stages, model.config)
    if any(stage.questions_per_sequence > 1 for stage in settings.stages):
        attend_to_shared_prefix(model.language_model)  # refuses a decoder that cannot, before slides are read
    datasets = _checked_datasets(settings, ChatRenderer(tokenizer), model.config, generators, output, processes)
    return _Start(start, model, tokenizer, datasets)


def _with_scorer(settings: TrainSettings, output: Path, generators: Generators | None) -> ModelSettings:
    """The model's settings, with the scorer of the run that comes first; that run is made unless it is there."""
    if settings.scorer_run is None:
        return settings.model
    checkpoint = output / CHECKPOINT
    if not checkpoint.exists():
        shared = {"seed": settings.seed, "encoder_mismatch": settings.encoder_mismatch}
        train(settings.scorer_run.changed(**shared), output, generators)
    return settings.model.changed(scorer_from=str(checkpoint))


def _checked_datasets(
    settings: TrainSettings,
    renderer: ChatRenderer,
    config: SparseWSIConfig,
    generators: Generators,
    output: Path,
    processes: PartialState,
) -> list[SlideDataset]:
    """One for each stage; all their bad items are named at once, by all processes."""
    datasets: list[SlideDataset] = []
    problems: list[str] = []
    memory = SlideMemory(output / REMEMBERED_SLIDES)
    for stage in settings.stages:
        if stage.sparselearn is not None and "score" in config.projector["inputs"]:
            raise SettingsError(
                f"stages: {stage.name}: found sparselearn beside a projector that reads scores, wanted none: "
                "the decoder would read the scores, and the scorer learn nothing from its answers (scorer_run)"
            )
        if stage.sparselearn is not None and stage.sparselearn.num_slide_tokens != config.num_kept_patches:
            found, wanted = stage.sparselearn.num_slide_tokens, config.num_kept_patches
            raise SettingsError(
                f"stages: {stage.name}: num_slide_tokens: found {found}, wanted {wanted}, as the model keeps patches"
            )
        try:
            dataset = make_dataset(stage.data, renderer, config, settings.seed, generators)
        except QuestionError as error:
            problems += error.problems
            dataset = _dataset(error.items, stage.data, renderer, config, settings.seed)
        if stage.data.generate is None:
            arguments = stage.data.read_first, settings.encoder_mismatch, memory
            problems += on_main_process(processes, partial(dataset.problems, *arguments))
        datasets.append(dataset)
    if problems:
        raise QuestionError(list(dict.fromkeys(problems)))
    return datasets


def make_dataset(
    data: DataSettings, renderer: ChatRenderer, config: SparseWSIConfig, seed: int, generators: Generators
) -> SlideDataset:
    """The items of one stage's data, unread. Errors as of `items_of`."""
    return _dataset(items_of(data, generators), data, renderer, config, seed)


def items_of(data: DataSettings, generators: Generators) -> Sequence[SlideItem]:
    """The questions of some settings, generated or from files.

    Raises:
        SettingsError: no such generator, or arguments that it does not have.
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
        return make(**options)
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
    return items


def _dataset(
    items: Sequence[SlideItem], data: DataSettings, renderer: ChatRenderer, config: SparseWSIConfig, seed: int
) -> SlideDataset:
    return SlideDataset(items, renderer, config, data.max_patches, data.stretch_positions, data.mix_positions, seed)


def _claim(output: Path, settings: TrainSettings, processes: PartialState) -> None:
    """Makes the output directory this run's own: all processes look, the main one writes."""
    if (output / CHECKPOINT).exists():
        raise SettingsError(f"{output}: found a finished run, wanted a new directory")
    text, mine = settings.model_dump_json(indent=2), output / SETTINGS
    if mine.exists() and mine.read_text() != text:
        raise SettingsError(f"{output}: found a run of other settings ({SETTINGS}), wanted a new directory")
    processes.wait_for_everyone()
    if processes.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        mine.write_text(text)


def _unclaim(output: Path) -> None:
    """Gives the directory back, unless something was trained in it: mended settings may then take their place."""
    if not (output / "stages").exists() and not (output / SCORER_RUN).exists():
        (output / SETTINGS).unlink(missing_ok=True)
