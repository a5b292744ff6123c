"""How far sufficiency, in_distribution and confidence can be trusted: `python -m bench.study.trust CHECKPOINT`.

A calibrated checkpoint (`vllm-wsi calibrate`) is asked questions of haystack's test split, three of ten of them about a
slide without a finding: in its own world, and in worlds that it has not seen. Whatever is a threshold was chosen on
validation. With `--tissue-dir` it is a checkpoint of tissue, asked about slides of patients that neither training nor
validation saw, and about the same ones stained and lit otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from bench.common.record import RESULTS, append_row, check_header
from vllm_wsi.confidence import calibration_error, risk_coverage
from vllm_wsi.errors import SettingsError
from vllm_wsi.haystack.generator import haystack_items
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.checkpoint import load_calibration
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.calibration import USUAL, Calibration
from vllm_wsi.stats import mean_interval
from vllm_wsi.study.calibrate import ReadAnswer, ask
from vllm_wsi.tissue.tissue_generator import tissue_items

CSV = RESULTS / "study" / "trust.csv"
EMPTY = 0.3
WORLDS: dict[str, dict[str, Any]] = {
    "its own": {}, "noise 1.5": {"noise": 1.5}, "noise 2.0": {"noise": 2.0},
    "look-alikes 1 %": {"lookalike_rate": 0.01}, "look-alikes 5 %": {"lookalike_rate": 0.05},
    "turned by 20 degrees": {"shift_degrees": 20.0},
    "another world": {"seed": 1},
}  # fmt: skip
TISSUE: dict[str, dict[str, Any]] = {"new patients": {"num_views": 1}, "new patients, other stains": {"num_views": 4}}
COLUMNS = (
    "world", "num_patches", "questions", "lacking", "accuracy", "accuracy_low", "accuracy_high", "confidence",
    "calibration_error_t1", "calibration_error", "aurc", "risk_at_80", "aurc_sufficiency", "sufficiency_auroc",
    "enough_of_shown", "enough_of_lacking", "confidently_wrong_of_lacking", "told_unlike",
)  # fmt: skip
CONFIDENT = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="directory, with calibration.json")
    parser.add_argument("--tissue-dir", type=Path, help="the folder of the labelled tissue (docs/tissue.md)")
    parser.add_argument("--questions", type=int, default=200, help="of each world and length (default 200)")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    model = SparseWSIForConditionalGeneration.from_pretrained(args.checkpoint).eval()
    model.config.encoder = None  # another world's features are refused else
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(args.checkpoint))
    calibration = load_calibration(args.checkpoint, model.selector().scorer)
    if calibration is None:
        raise SettingsError(f"{args.checkpoint}: found no calibration.json, wanted one of vllm-wsi calibrate")
    groups = haystack(args.questions) if args.tissue_dir is None else tissue(args.tissue_dir, args.questions)
    for world, num_patches, absent, items in groups:
        found = measures(calibration, ask(model, renderer, items, absent))
        row = {"world": world, "num_patches": num_patches, "questions": len(items)} | found
        append_row(args.csv, row)
        print(row, flush=True)


def haystack(count: int) -> Iterator[tuple[str, int, str, Sequence[SlideItem]]]:
    """(world, N, the option that says «not on this slide», questions)."""
    for world, knobs in WORLDS.items():
        for num_patches in (1000, 4000):
            yield world, num_patches, "none", haystack_items("test", count, num_patches, empty_share=EMPTY, **knobs)


def tissue(folder: Path, count: int) -> Iterator[tuple[str, int, str, Sequence[SlideItem]]]:
    """The same, of patients of fold 0's test side that `calibrate_tissue.yaml` leaves for tests."""
    for world, knobs in TISSUE.items():
        for num_patches in (256, 900):
            recipe = {
                "data": folder, "side": "test", "part": (0.5, 1), "questions": ["presence"], "count": count,
                "num_patches": num_patches, "shares": [0, (0.02, 0.35)], "first": 500_000,
            }  # fmt: skip
            yield world, num_patches, "no", tissue_items(**recipe | knobs)


def measures(calibration: Calibration, asked: Sequence[ReadAnswer]) -> dict[str, Any]:
    """What is wrong, and what was said of it, of one group of questions."""
    right = np.array([int(one.logprobs.argmax()) == one.right for one in asked])
    shown = np.array([one.shows for one in asked])
    summaries = [one.selection.summary for one in asked]
    assert all(one is not None for one in summaries)
    known = [(one, asked[i].selection.num_patches) for i, one in enumerate(summaries) if one is not None]
    sufficiency = np.array([calibration.sufficiency(one, n) for one, n in known])
    unlike = [calibration.in_distribution(one, n) < USUAL for one, n in known]
    plain, confidence = (_confidence(asked, temperature) for temperature in (1.0, calibration.temperature))
    curve, enough = risk_coverage(right, confidence), sufficiency >= calibration.enough
    accuracy = mean_interval(right.astype(float))
    values = (
        int((~shown).sum()), *accuracy, confidence.mean(), calibration_error(right, plain),
        calibration_error(right, confidence), curve.area, curve.risk_at(0.8), risk_coverage(right, sufficiency).area,
        _auroc(sufficiency[shown], sufficiency[~shown]), enough[shown].mean(), enough[~shown].mean(),
        (~right & (confidence > CONFIDENT))[~shown].mean(), float(np.mean(unlike)),
    )  # fmt: skip
    return dict(zip(COLUMNS[3:], (round(float(one), 3) for one in values), strict=True))


def _confidence(asked: Sequence[ReadAnswer], temperature: float) -> NDArray[np.float64]:
    scaled = [one.logprobs / temperature for one in asked]
    return np.array([float(np.exp(one.max() - np.logaddexp.reduce(one))) for one in scaled])


def _auroc(higher: NDArray, lower: NDArray) -> float:
    """The share of pairs that stand in the right order; ties count half."""
    return float(((higher[:, None] > lower).mean() + (higher[:, None] >= lower).mean()) / 2)


if __name__ == "__main__":
    main()
