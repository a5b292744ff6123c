"""The command `vllm-wsi study`: from its arguments to tables, figures and a record of what was run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from vllm_wsi.demo_model import DEMO_CHECKPOINT
from vllm_wsi.questions import read_questions

from .haystack import GENERATORS, HaystackWorld, groups_of_length, recipe
from .judge import evidence_of
from .plots import draw_tables, draw_umap
from .study import LEARNED, Groups, Study, by_length, write_origin, write_table

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
    out: Path,
) -> int:
    """Returns the exit status."""
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
    study = Study(checkpoint or str(DEMO_CHECKPOINT), groups, out, seed)
    study.run()
    _draw_kept(study, groups, out)
    if ablations is not None:
        from vllm_wsi.training.settings import load_settings

        from .ablations import run_ablations

        rows = []
        settings, asked = load_settings(recipe(ablations)), groups_of_length(ablation_slides, HaystackWorld())
        with tempfile.TemporaryDirectory(prefix="vllm-wsi-study-") as work:
            for row in run_ablations(settings, asked, GENERATORS, range(1, seeds + 1), Path(work) / "start"):
                rows.append(row)
                write_table(out / "ablations.csv", rows)
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
                rows = slide.read_rows(0, slide.num_patches).astype(np.float32)
            title = f"{items[0].slides[0].name}: kept among all"
            draw_umap(out / "umap.png", rows, chosen.indices.numpy(), evidence_of(items[0]), title)
            return
