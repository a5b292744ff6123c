"""A whole study of real tissue: rows, tables, figures, and a record of what was run."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_wsi.errors import SetupError
from vllm_wsi.files import write_csv

from .origin import write_origin
from .tissue_figures import draw_by_share, draw_maps, draw_reliability, tissue_maps
from .tissue_settings import TissueStudySettings
from .tissue_study import SCORED, TissueStudy
from .tissue_tables import answer_table, calibration_table, reliability_table, selection_table

logger = logging.getLogger(__name__)
ROWS = ("selections", "answers", "scores")
Row = dict[str, Any]


def write_tissue_study(settings: TissueStudySettings) -> list[Path]:
    """Writes rows, tables and figures into `settings.out`, and what was run into `study-foldF-seedS.json`.

    A folder that holds rows of other folds or seeds keeps them, and tables and figures are of all. So the folds of one
    study are run one after another into one folder, each with its own checkpoint.

    Returns:
        The figures.

    Raises:
        SetupError: the tissue's folder is not there, "cuda" where there is none, or a package is missing.
        SettingsError, SlideError, EncoderError, CheckpointError: of what was asked and of the files that are read.
    """
    began = time.monotonic()
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SetupError("device: found 'cuda', wanted 'cpu': PyTorch finds no CUDA device here")
    study = TissueStudy(settings)
    study.run()
    settings.out.mkdir(parents=True, exist_ok=True)
    own = (str(settings.fold), str(settings.seed))
    rows = {}
    for name, made in zip(ROWS, (study.selections, study.answers, study.score_rows()), strict=True):
        path = settings.out / f"{name}.csv"
        kept = [row for row in read_rows(path) if (row["fold"], row["seed"]) != own]
        write_csv(path, [*kept, *made])
        rows[name] = read_rows(path)
    figures = write_tables(settings.out, rows["selections"], rows["answers"])
    figures.append(_draw_near_whole(study, settings.out / f"near_whole-fold{settings.fold}-seed{settings.seed}.png"))
    record = settings.out / f"study-fold{settings.fold}-seed{settings.seed}.json"
    write_origin(record, study.settings.record(), time.monotonic() - began)
    return figures


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file, all of text; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_tables(out: Path, selections: Sequence[Row], answers: Sequence[Row]) -> list[Path]:
    """Tables and figures of rows of whatever folds and seeds; returns the figures."""
    tables = {
        "selection_table": selection_table(selections),
        "answer_table": answer_table(answers),
        "calibration": calibration_table(answers),
        "reliability": reliability_table(answers),
    }
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", rows)
    figures: list[Path | None] = [draw_reliability(out / "reliability.png", tables["reliability"])]
    for length in dict.fromkeys(row["length"] for row in tables["selection_table"]):
        name = f"recall_{length}.png"
        label = "recall of the kept, of what K could keep"
        figures.append(draw_by_share(out / name, tables["selection_table"], length, "recall", label))
        for kind in dict.fromkeys(row["kind"] for row in tables["answer_table"]):
            of_kind = [row for row in tables["answer_table"] if row["kind"] == kind]
            label = f"written answers right ({kind.replace('_', ', ')})"
            figures.append(draw_by_share(out / f"{kind}_{length}.png", of_kind, length, "written_accuracy", label))
    return [path for path in figures if path is not None]


def _draw_near_whole(study: TissueStudy, path: Path) -> Path:
    slide = study.near_whole
    with slide.open() as opened:
        scores = {name: study.scores(name, opened) for name in SCORED}
        coords = opened.read_coords()
    assert coords is not None
    return draw_maps(path, tissue_maps(coords, slide.pool.patch_px, slide.labels(), scores, study.k))
