"""Ablations of the training path: each arm changes one of its switches and is trained from the same start."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar

from vllm_wsi.errors import SettingsError
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.checkpoint import read_config
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.processes import process_pool
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.slides.encoder_names import EncoderCheck, Mismatch
from vllm_wsi.training.dataset import SlideDataset
from vllm_wsi.training.settings import TrainSettings
from vllm_wsi.training.sparselearn import SparseLearn
from vllm_wsi.training.stages import run_stage
from vllm_wsi.training.train import Generators, make_dataset, train

from .groups import Groups, longest_slide, slide_names
from .judge import Judged, judge, select_all
from .leakage import measure_leakage
from .soft import judge_soft, served_gate
from .study import LEARNED, mean_recall
from .study_model import study_model
from .table_numbers import rounded

ARMS: dict[str, dict[str, str]] = {
    "noise gate, diagonal denoiser": {},
    "noise gate, no denoiser": {"denoiser": "none"},
    "noise gate, global denoiser": {"denoiser": "global"},
    "scale gate, diagonal denoiser": {"gate": "scale"},
    "no gate": {"gate": "none", "denoiser": "none"},
    "Gumbel straight-through": {"relaxation": "gumbel"},
}
"""What each arm changes in `SWITCHES`. Everything else, such as the schedules of tau and K, is the recipe's."""

REFERENCE = "noise gate, diagonal denoiser"
"""The paper's arm, with which all others are compared. The schedules of tau and K that the recipes of this project have
were tuned for it; no schedule was tuned for another arm, so a difference may be the schedule's."""

SWITCHES = {"gate": "noise", "denoiser": "diagonal", "relaxation": "lapsum"}
"""As the paper has them."""

SOFT_LENGTH = 1024
"""The longest slides, in patches, that the soft path is judged on, as it sends every patch through the decoder."""

SOFT_QUESTIONS = 64
"""Questions that are judged through the soft path, at most."""

LEAKAGE_QUESTIONS = 16
"""Questions on whose slides leakage is measured, at most."""


SOFT_COLUMNS = (
    *("soft_questions", "soft_accuracy", "hard_accuracy_of_the_same", "soft_mass_on_hard"),
    *("leakage_slides", "leakage_mean", "leakage_max", "leakage_rescored_mean", "leakage_rescored_max"),
)
"""Columns that are filled where the slides are no longer than `SOFT_LENGTH`."""


class ArmResult(NamedTuple):
    """What one arm did, by one seed, on the questions of one length."""

    row: dict[str, Any]  # of ablations.csv
    questions: list[dict[str, Any]]  # of ablation_questions.csv: one row for each question


def check_recipe(settings: TrainSettings, groups: Groups) -> None:
    """Whether `run_ablations` can train by this recipe and judge on these questions.

    Raises:
        SettingsError: the recipe's last stage trains no scorer, or on features of another size.
        EncoderError: the questions' slides are of another encoder.
    """
    if settings.stages[-1].sparselearn is None:
        name = settings.stages[-1].name
        raise SettingsError(f"stage {name}: found no sparselearn, wanted it in the last stage of an ablation")
    start = settings.model
    if start.scorer_from is not None:
        raise SettingsError(f"scorer_from: found {start.scorer_from}, wanted none: every arm begins with a new scorer")
    trains_on = start.new or start if start.checkpoint is None else read_config(start.checkpoint, start.revision)
    wanted = trains_on.feature_dim
    with next(iter(groups.values()))[0].slides[0].open() as slide:
        if slide.feature_dim != wanted:
            raise SettingsError(f"{slide.name}: found d = {slide.feature_dim}, wanted {wanted}, as the recipe trains")
        check = EncoderCheck(trains_on.encoder, settings.encoder_mismatch, patch_um=trains_on.patch_um)
        check(slide.name, slide.metadata)


def run_ablations(
    settings: TrainSettings, groups: Groups, generators: Generators, seeds: Sequence[int], work: Path
) -> Iterator[ArmResult]:
    """Trains the last stage of `settings` once for every arm and seed; yields a result for each and each length.

    On CPUs, seeds are trained side by side, each on its share of the cores: small models gain little from many.

    Args:
        settings: as `check_recipe` accepts. The stages before the last are run once, with the recipe's own seed; every
            arm starts from their checkpoint, with a new scorer. The scorer, the denoiser, the noise and the order of
            slides follow from the arm's seed.
        groups: questions that no stage was trained on.
        generators: of the questions that the recipe is trained on, by name.
        work: directory for the checkpoint that all arms start from; one that is there is used again.
    """
    base = work / "checkpoint"
    if not base.is_dir():
        base = train(settings.model_copy(update={"stages": settings.stages[:-1]}), work, generators)
    arms = [(seed, arm) for seed in seeds for arm in ARMS]
    cores = len(os.sched_getaffinity(0))
    workers = 1 if torch.cuda.is_available() else min(len(seeds), cores)
    if workers == 1:
        for seed, arm in arms:
            yield from _run_arm(settings, groups, generators, base, arm, seed)
        return
    with process_pool(workers, _start_worker, cores // workers) as pool:
        runs = [pool.submit(_run_arm, settings, groups, generators, base, arm, seed) for seed, arm in arms]
        for run in runs:
            yield from run.result()


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    disable_progress_bar()


def _run_arm(
    settings: TrainSettings, groups: Groups, generators: Generators, base: Path, arm: str, seed: int
) -> list[ArmResult]:
    stage = settings.stages[-1]
    assert stage.sparselearn is not None
    changed = stage.model_copy(
        update={
            "sparselearn": stage.sparselearn.changed(**(SWITCHES | ARMS[arm])),
            "learning_rate": {"denoiser": stage.learning_rate["scorer"]} | stage.learning_rate,
        }
    )
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(base))
    model = study_model(base)
    config, device = model.config, model.device
    model.scorer = seeded_scorer(seed=seed, **config.scorer_options)
    set_seed(seed)
    dataset = make_dataset(changed.data, renderer, config, seed, generators)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(dir=base.parent))
    try:
        run = settings.model_copy(update={"seed": seed})
        gate = run_stage(model, changed, dataset, renderer.tokenizer, folder, 0, run).sparselearn
    finally:
        shutil.rmtree(folder)
    seconds = time.monotonic() - began
    assert gate is not None
    origin = {"arm": arm, "seed": seed}
    of_row = origin | {
        "schedules": "tuned for this arm" if arm == REFERENCE else f"tuned for {REFERENCE}",
        "training_seconds": round(seconds, 1),
    }
    results = _judge_arm(model.to(device).eval(), renderer, groups, gate, settings.encoder_mismatch)
    return [ArmResult(of_row | row, [origin | one for one in questions]) for row, questions in results]


def _judge_arm(
    model: SparseWSIForConditionalGeneration,
    renderer: ChatRenderer,
    groups: Groups,
    gate: SparseLearn,
    encoder_mismatch: Mismatch,
) -> Iterator[ArmResult]:
    k = model.config.num_slide_tokens
    slides = slide_names(groups)
    for length, items in groups.items():
        chosen = select_all(items, {LEARNED: model.selector(encoder_mismatch)}, k)
        found = {name: judge(model, renderer, items, selections, k) for name, selections in chosen.items()}
        row = {
            "length": length,
            "questions": len(items),
            "accuracy": rounded(found[LEARNED].correct.mean()),
            "oracle_accuracy": rounded(found["oracle"].correct.mean()) if "oracle" in found else "",
            "key_patch_recall": mean_recall(found[LEARNED]),
        }
        soft = dict.fromkeys(SOFT_COLUMNS, "")
        if max(longest_slide(item) for item in items) <= SOFT_LENGTH:
            soft = _soft_columns(model, renderer, items, gate, found[LEARNED])
        yield ArmResult(row | soft, _question_rows(length, slides[length], found[LEARNED]))


def _soft_columns(
    model: SparseWSIForConditionalGeneration,
    renderer: ChatRenderer,
    items: Sequence[SlideItem],
    gate: SparseLearn,
    learned: Judged,
) -> dict[str, Any]:
    """`SOFT_COLUMNS` of the first questions."""
    part = items[:SOFT_QUESTIONS]
    soft = judge_soft(model, renderer, part, gate, learned.selections)
    dataset = SlideDataset(part[:LEAKAGE_QUESTIONS], renderer, model.config, SOFT_LENGTH)
    leakage = measure_leakage(model, served_gate(model, gate), dataset, learned.selections[: len(dataset)])
    return {
        "soft_questions": len(part),
        "soft_accuracy": rounded(soft.correct.mean()),
        "hard_accuracy_of_the_same": rounded(learned.correct[: len(part)].mean()),
        "soft_mass_on_hard": rounded(soft.mass_on_hard.mean()),
    } | leakage.columns()


def _question_rows(length: str, slides: Sequence[str], learned: Judged) -> list[dict[str, Any]]:
    recalls = [""] * len(slides) if learned.key_patch_recall is None else learned.key_patch_recall.tolist()
    return [
        {
            "length": length,
            "slide": slide,
            "question": number,
            "correct": int(correct),
            "key_patch_recall": recall if recall == "" or math.isnan(recall) else rounded(recall),
        }
        for number, (slide, correct, recall) in enumerate(zip(slides, learned.correct, recalls, strict=True))
    ]
