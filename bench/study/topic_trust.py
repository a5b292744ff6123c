"""«Not on this slide» by a scorer that hears the question: `python -m bench.study.topic_trust RUNS --seeds 0 1 2`.

Slides of eight topics (`haystack/topics.py`). A fifth of those to train on, and three of ten of the others, show
nothing of the topic that is asked about. A decoder and a scorer that hears the question learn as in `topic_scorers.py`,
are calibrated on validation slides, and asked about test slides: in their own world, and in worlds that they have not
seen. It takes about ten minutes a seed on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.common.record import RESULTS, append_row, check_header
from vllm_wsi.haystack.topics import topic_items
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.study.calibrate import ask, calibrate

from .topic_scorers import QUESTION, D, decoder_of, scorer_of
from .trust import COLUMNS as OF_A_WORLD
from .trust import EMPTY, measures

CSV = RESULTS / "study" / "topic_trust.csv"
COLUMNS = ("seed", *OF_A_WORLD)
TRAINING_ABSENT = 0.2
WORLDS: dict[str, dict[str, Any]] = {"its own": {}, "noise 1.5": {"noise": 1.5}, "noise 2.0": {"noise": 2.0}}
OTHER_SEED = 1000  # of another world's patch types
LENGTHS = (1000, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="directory of the training runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--decoder-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=240, help="of the scorer (default 240)")
    parser.add_argument("--questions", type=int, default=128, help="of each world and length (default 128)")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    for seed in args.seeds:
        runs = args.runs / str(seed)
        decoder = decoder_of(runs / "decoder", seed, args.decoder_steps, TRAINING_ABSENT)
        checkpoint = scorer_of(runs / "question", decoder, QUESTION, seed, args.steps, TRAINING_ABSENT)
        training = [item for n in LENGTHS for item in questions("train", 100, n, 2_000_000, seed=seed)]
        validation = [item for n in LENGTHS for item in questions("validation", 250, n, seed=seed)]
        calibration, _ = calibrate(checkpoint, training, validation, "none")
        model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval()
        renderer = ChatRenderer(AutoTokenizer.from_pretrained(checkpoint))
        model.config.encoder = None  # another world's features are refused else
        for world, knobs in (*WORLDS.items(), ("another world", {"seed": seed + OTHER_SEED})):
            for n in LENGTHS:
                asked = ask(model, renderer, questions("test", args.questions, n, **{"seed": seed, **knobs}), "none")
                row = {"seed": seed, "world": world, "num_patches": n, "questions": len(asked)}
                append_row(args.csv, row | measures(calibration, asked))
                print(row | measures(calibration, asked), flush=True)


def questions(split: str, count: int, num_patches: int, first: int = 0, **world: Any) -> Sequence[SlideItem]:
    """Three of ten of them about a slide that shows nothing of the topic."""
    return topic_items(split, count, num_patches, first, feature_dim=D, absent_share=EMPTY, **world)


if __name__ == "__main__":
    main()
