"""The command `vllm-wsi study`: from its arguments to tables, figures and a record of what was run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from vllm_wsi.files import write_csv
from vllm_wsi.haystack.checkpoint import DEMO_CHECKPOINT
from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import GENERATORS, groups_of_length, recipe
from vllm_wsi.questions.reader import read_questions
from vllm_wsi.selection.baselines import finite_patches
from vllm_wsi.slides.encoder_names import Mismatch

from .groups import Groups, by_length
from .judge import key_patches_of
from .origin import write_origin
from .plots import draw_tables, draw_umap
from .study import LEARNED, Study

UMAP_PATCHES = 8192


def run_study(
    checkpoint: str | None,
    questions: Path | None,
    features: Path | None,
    slides: str,
    ablations: str | None,
    seeds: int,
    ablation_slides: str,
    seed: int,
    device: str,
    encoder_mismatch: Mismatch,
    out: Path,
) -> int:
    """Returns the exit status. The ablations are judged on the questions, where there are any, else on haystack."""
    arguments = {name: str(value) for name, value in locals().items() if value is not None and name != "out"}
    began = time.monotonic()
    if questions is None:
        groups: Groups = groups_of_length(slides, HaystackWorld())
    elif features is None:
        raise ValueError("--questions: found no --features beside it, wanted the directory of feature files")
    else:
        items = [item for item in read_questions(questions, features) if item.options]
        if not items:
            raise ValueError(f"{questions}: found no question of multiple choice, wanted at least one")
        groups = by_length(items)
    if ablations is not None:
        from vllm_wsi.training.settings import load_settings

        from .ablations import check_recipe, run_ablations

        settings = load_settings(recipe(ablations))
        if encoder_mismatch == "allow":
            settings.encoder_mismatch = "allow"
        asked = groups_of_length(ablation_slides, HaystackWorld()) if questions is None else groups
        check_recipe(settings, asked)
    study = Study(checkpoint or str(DEMO_CHECKPOINT), groups, out, seed, device, encoder_mismatch)
    study.run()
    _draw_kept(study, groups, out)
    if ablations is not None:
        rows = []
        with tempfile.TemporaryDirectory(prefix="vllm-wsi-study-") as work:
            for row in run_ablations(settings, asked, GENERATORS, range(1, seeds + 1), Path(work) / "start"):
                rows.append(row)
                write_csv(out / "ablations.csv", rows)
                print(", ".join(f"{name} {value}" for name, value in row.items() if value != ""), flush=True)
    for path in draw_tables(out):
        print(path)
    write_origin(out / "study.json", arguments, time.monotonic() - began)
    return 0


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
