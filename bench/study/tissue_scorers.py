"""Tiles of a slide that are chosen for the question, on real tissue: `python -m bench.study.tissue_scorers RUNS
--tissue-dir DIR`.

The eight tissue classes of Kather et al. 2016 (docs/tissue.md). One slide is left out of training at a time. A decoder
learns to read slides of 32 tiles; behind it two scorers learn from the answers on slides of 128 tiles, by the same
steps: one without the question, whose tiles must serve all eight questions, and one that hears it. Both are asked the
same questions about slides pooled from the tiles of the slide that was left out. It takes about six minutes a slide on
one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import AutoTokenizer

from bench.common.record import RESULTS, append_row, check_header
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.selection.baselines import make_policy
from vllm_wsi.selection.selection import Selection
from vllm_wsi.stats import mean_interval
from vllm_wsi.study.calibrate import question_query
from vllm_wsi.study.study import made_diverse
from vllm_wsi.study.tissue_answering import Asked, scored, write_answers
from vllm_wsi.study.tissue_classes import class_oracle
from vllm_wsi.tissue.kather import TISSUES, KatherItem, KatherSlide, kather_encoder, kather_pool
from vllm_wsi.tissue.tissue_generator import GENERATORS
from vllm_wsi.tissue.tissue_recipe import TISSUE_RECIPES

from .scorer_arms import begin_with, trained

CSV = RESULTS / "study" / "tissue_scorers.csv"
COLUMNS = (
    "left_out", "seed", "num_patches", "k", "arm", "slides", "questions", "accuracy", "accuracy_low", "accuracy_high",
    "asked_tiles_kept", "kept_at_least_one",
)  # fmt: skip
KS = (8, 32)
N = 128
SCORERS: dict[str, dict[str, Any]] = {
    "question-free": {"kind": "patch", "hidden_size": 64},
    "question": {"kind": "question", "hidden_size": 64, "rank": 16, "free_tokens": 8},
}
STEPS, BATCH = 200, 32
Chosen = dict[str, list[Selection]]
"""Arm -> a selection for each question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="directory of the training runs")
    parser.add_argument("--tissue-dir", type=Path, required=True)
    parser.add_argument("--leave-out", nargs="+", default=["01", "02", "03", "04", "05"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slides", type=int, default=40, help="pooled from the left-out slide's tiles")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    for left_out in args.leave_out:
        runs = args.runs / f"{left_out}-{args.seed}"
        decoder = reader(runs / "reader", args.tissue_dir, left_out, args.seed)
        models = {
            arm: scorer_of(runs, arm, decoder, args.tissue_dir, left_out, args.seed) for arm in SCORERS
        }  # fmt: skip
        pool = kather_pool(args.tissue_dir, left_out, "test")
        slides = [KatherSlide(pool, min(N, len(pool.rows)), number) for number in range(args.slides)]
        for k in KS:
            for arm, checkpoint in models.items():
                for name, measured in asked(checkpoint, arm, slides, k):
                    row = {"left_out": left_out, "seed": args.seed, "num_patches": N, "k": k, "arm": name}
                    append_row(args.csv, row | measured)
                    print(row | measured, flush=True)


def reader(run: Path, tissue_dir: Path, left_out: str, seed: int) -> Path:
    """The first stage of the recipe `kather`: a decoder that reads short slides."""
    recipe = yaml.safe_load(TISSUE_RECIPES["kather"].read_text())
    recipe["model"]["new"]["encoder"] = kather_encoder(left_out)
    stage = recipe["stages"][0]
    stage["data"]["generate"] |= {"data": str(tissue_dir), "leave_out": left_out}
    return trained(run, recipe["model"], [stage], seed, GENERATORS)


def scorer_of(runs: Path, arm: str, decoder: Path, tissue_dir: Path, left_out: str, seed: int) -> Path:
    """A scorer that learned from the answers, and the decoder and projector that learned with it."""
    slides = {
        "name": "kather", "data": str(tissue_dir), "leave_out": left_out, "first": 100_000, "num_patches": N,
        "count": STEPS * BATCH // len(TISSUES), "questions_per_slide": len(TISSUES),
    }  # fmt: skip
    stage = {
        "name": "scorer", "data": {"generate": slides}, "train": ["scorer", "projector", "decoder"],
        "sparselearn": {"k_start": 112, "k_end": 8, "k_fraction": 1.0, "tau_end": 0.5},
        "learning_rate": {"scorer": 1e-3, "denoiser": 1e-4, "projector": 1e-3, "decoder": 1e-3},
        "warmup_steps": 10, "min_lr_rate": 0.1, "steps": STEPS, "batch_size": BATCH,
    }  # fmt: skip
    start = begin_with(runs / f"start-{arm}", decoder, SCORERS[arm], seed)
    return trained(runs / arm, {"checkpoint": str(start)}, [stage], seed, GENERATORS)


def asked(checkpoint: Path, arm: str, slides: list[KatherSlide], k: int) -> list[tuple[str, dict[str, Any]]]:
    """(arm, its measures): all eight questions about every slide; beside the question-free arm its rivals."""
    model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval()
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(checkpoint))
    selector, items = model.selector(), [slide.item(tissue) for slide in slides for tissue in range(len(TISSUES))]
    chosen: Chosen = {}
    for slide in slides:
        of_slide = [item for item in items if item.slides[0] is slide]
        with slide.open() as opened:
            if arm == "question":
                queries = [question_query(model, renderer, item) for item in of_slide]
                chosen.setdefault(arm, []).extend(selector.select(opened, k, query=query) for query in queries)
                continue
            policies = {
                arm: selector,
                "random": make_policy("random", k),
                "equal shares": class_oracle(slide.tissues, k),
            }
            policies |= {f"{arm}, MMR": one for one in made_diverse(model, k).values()}
            for name, policy in policies.items():
                chosen.setdefault(name, []).extend([policy.select(opened, k)] * len(of_slide))
    return [(name, measured(model, renderer, items, selections, k)) for name, selections in chosen.items()]


# Many parameters: what answers, what is asked, and of what.
def measured(
    model: SparseWSIForConditionalGeneration,
    renderer: ChatRenderer,
    items: list[KatherItem],
    selections: list[Selection],
    k: int,
) -> dict[str, Any]:
    """Accuracy of the likeliest answers, and how many of the asked tiles were kept where there are any."""
    questions = [Asked(item, item.asked, one) for item, one in zip(items, selections, strict=True)]
    answers = write_answers(model, renderer, questions, 1)
    right = [float(scored(one.question, answer)["correct"]) for one, answer in zip(questions, answers, strict=True)]
    names = [item.slides[0].name for item in items]
    accuracy = mean_interval(right, names)
    kept = [
        (int(np.isin(one.indices.numpy(), item.key_patches).sum()), min(k, len(item.key_patches)))
        for item, one in zip(items, selections, strict=True)
        if len(item.key_patches)
    ]
    return {
        "slides": len(set(names)),
        "questions": len(items),
        **dict(zip(COLUMNS[7:10], (round(float(one), 3) for one in accuracy), strict=True)),
        "asked_tiles_kept": round(float(np.mean([found / most for found, most in kept])), 3),
        "kept_at_least_one": round(float(np.mean([found > 0 for found, _ in kept])), 3),
    }


if __name__ == "__main__":
    main()
