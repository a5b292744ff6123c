"""The demo's whole recipe from several seeds: `python -m bench.study.recipe_seeds RUNS`.

It takes seven minutes a seed on one core.

Trains `vllm-wsi train haystack --seed S` into RUNS/S, for S = 0 to 4, unless a finished run is there: a decoder, a
projector and a scorer of their own, from first to last. Each is judged on haystack's test slides against its own oracle
(the key patches alone), in both position modes, without retraining. Rows go to `bench/results/study/recipe_seeds.csv`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from bench.common.record import RESULTS
from vllm_wsi.files import write_csv
from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import GENERATORS, groups_of_length, recipe
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.study.judge import judge, select_all, with_positions
from vllm_wsi.study.study import LEARNED
from vllm_wsi.study.table_numbers import rounded
from vllm_wsi.training.settings import load_settings
from vllm_wsi.training.train import train

SEEDS = (0, 1, 2, 3, 4)
SLIDES = "4000:96,100000:24"


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's whole recipe from several seeds.")
    parser.add_argument("runs", type=Path, help="directory of the training runs")
    runs = parser.parse_args().runs
    groups = groups_of_length(SLIDES, HaystackWorld())
    rows = []
    for seed in SEEDS:
        checkpoint = runs / str(seed) / "checkpoint"
        if not checkpoint.is_dir():
            settings = load_settings(recipe("haystack"))
            settings.seed = seed
            train(settings, checkpoint.parent, GENERATORS)
        model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval()
        renderer = ChatRenderer(AutoTokenizer.from_pretrained(checkpoint))
        k = model.config.num_slide_tokens
        for length, items in groups.items():
            chosen = select_all(items, {LEARNED: model.selector()}, k)
            for mode in ("original", "packed"):
                placed = with_positions(model, mode)
                found = {name: judge(placed, renderer, items, chosen[name], k) for name in (LEARNED, "oracle")}
                recall = found[LEARNED].key_patch_recall
                assert recall is not None
                row = {"seed": seed, "length": length, "positions": mode, "questions": len(items)}
                row |= {"accuracy": rounded(found[LEARNED].correct.mean())}
                row |= {"oracle_accuracy": rounded(found["oracle"].correct.mean())}
                rows.append(row | {"key_patch_recall": rounded(recall.mean())})
                print(rows[-1], flush=True)
    write_csv(RESULTS / "study" / "recipe_seeds.csv", rows)


if __name__ == "__main__":
    main()
