"""A whole study: tables, figures, ablations, and a record of what was run."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_wsi.errors import SettingsError, SetupError, needs_extra
from vllm_wsi.files import write_csv
from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT, GENERATORS, groups_of_length, recipe
from vllm_wsi.questions.reader import read_questions
from vllm_wsi.selection.patch_matrix import finite_patches

from .ablation_tests import ablation_tests
from .groups import Groups, by_length
from .hardness import write_hardness
from .judge import key_patches_of
from .origin import write_origin
from .plots import draw_tables, draw_umap
from .settings import StudySettings
from .study import LEARNED, Study

if TYPE_CHECKING:
    from vllm_wsi.training.settings import TrainSettings

logger = logging.getLogger(__name__)
UMAP_PATCHES = 8192


def write_study(settings: StudySettings) -> list[Path]:
    """Writes tables, figures and `study.json` into `settings.out`; logs each row of the ablations as it comes.

    The ablations are judged on the questions, where there are any, else on haystack.

    Returns:
        The figures.

    Raises:
        SettingsError: there is no question, or the ablations' recipe does not fit.
        SetupError: "cuda" where there is none, or a package is missing.
        QuestionError, SlideError, CheckpointError: of the files that are read.
    """
    began = time.monotonic()
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SetupError("device: found 'cuda', wanted 'cpu': PyTorch finds no CUDA device here")
    groups = _asked(settings)
    if settings.haystack_knobs is not None:
        groups_of_length(settings.haystack_knobs, HaystackWorld())  # refused before the first minutes are spent
    trained = None if settings.ablations is None else _recipe(settings.ablations, settings)
    judged_on = groups
    if trained is not None:
        if settings.questions is None:
            judged_on = groups_of_length(settings.ablation_slides, HaystackWorld())
        from .ablations import check_recipe

        check_recipe(trained, judged_on)
    checkpoint = settings.checkpoint or str(DEMO_CHECKPOINT)
    study = Study(checkpoint, groups, settings.out, settings.seed, settings.device, settings.encoder_mismatch)
    study.run()
    _draw_kept(study, groups, settings.out)
    if settings.haystack_knobs is not None:
        write_hardness(study, settings.haystack_knobs)
    if trained is not None:
        _ablate(trained, judged_on, settings)
    figures = draw_tables(settings.out)
    write_origin(settings.out / "study.json", settings.record(), time.monotonic() - began)
    return figures


def _asked(settings: StudySettings) -> Groups:
    if settings.questions is None:
        return groups_of_length(settings.slides, HaystackWorld())
    assert settings.features is not None
    items = [item for item in read_questions(settings.questions, settings.features) if item.options]
    if not items:
        raise SettingsError(f"{settings.questions}: found no question of multiple choice, wanted at least one")
    return by_length(items)


def _recipe(config: str, settings: StudySettings) -> TrainSettings:
    with needs_extra("train"):
        from vllm_wsi.training.settings import load_settings
    trained = load_settings(recipe(config))
    if settings.encoder_mismatch == "allow":
        trained.encoder_mismatch = "allow"
    return trained


def _ablate(trained: TrainSettings, groups: Groups, settings: StudySettings) -> None:
    from .ablations import REFERENCE, run_ablations

    rows, questions, seeds = [], [], range(1, settings.seeds + 1)
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-study-") as work:
        for row, of_questions in run_ablations(trained, groups, GENERATORS, seeds, Path(work) / "start"):
            rows.append(row)
            questions += of_questions
            write_csv(settings.out / "ablations.csv", rows)
            write_csv(settings.out / "ablation_questions.csv", questions)
            logger.info(", ".join(f"{name} {value}" for name, value in row.items() if value != ""))
    write_csv(settings.out / "ablation_tests.csv", ablation_tests(rows, questions, REFERENCE, settings.seed))


def _draw_kept(study: Study, groups: Groups, out: Path) -> None:
    """One slide of the longest group that UMAP takes in seconds."""
    for length, items in reversed(list(groups.items())):
        chosen = study.judged[length, LEARNED].selections[0][0]
        if chosen.num_patches <= UMAP_PATCHES:
            with items[0].slides[0].open() as slide:
                patches, _ = finite_patches(slide)
            rows, key = patches.rows.numpy(), key_patches_of(items[0])
            kept = np.flatnonzero(np.isin(rows, chosen.indices.numpy()))
            shown = None if key is None else np.flatnonzero(np.isin(rows, key))
            title = f"{items[0].slides[0].name}: kept among all"
            draw_umap(out / "umap.png", patches.features.numpy(), kept, shown, title)
            return
