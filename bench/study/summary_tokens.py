"""What the 32 best patches leave out: `python -m bench.study.summary_tokens RUNS --seeds 0 1 2`.

Questions of share (which tissue covers most, how much tumour) and an ordinary one (which finding, of few patches),
about virtual slides (`share_slides.py`). A small decoder is trained on what each arm of `summary_arms.py` shows, as a
stage with `selection: hard` would: K best patches by the demo checkpoint's scorer, or K - S best and S tokens for the
dropped ones: patches, or pooled means. All arms of a seed share the decoder's first weights, the training slides and
their order; the slides are the same for all seeds. Rows of the kind "seed" are of one decoder; rows of the kind
"pooled" are of all decoders, with slides as the independent units, and the difference from K best patches alone.

Tokens and answers are made once and kept in RUNS. It takes five minutes for the tokens and a minute for each arm and
seed, on one core. `bench.study.summary_cost` measures what pooled means cost beside a selection.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.common.record import RESULTS, append_row, check_header
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.kernels import ScorerWeights
from vllm_wsi.kernels.reference import apply_scorer
from vllm_wsi.model.checkpoint import trained_scorer
from vllm_wsi.selection.scorer import frozen_scorer

from .share_slides import KINDS, TEXTS, WORLD, ShareSlide
from .summary_arms import ARMS, Arm, K, Shown, hidden_vectors, shown
from .summary_decoder import MEASURES, Slides, answered, measures, settings, trained

CSV = RESULTS / "study" / "summary_tokens.csv"
COLUMNS = (
    "kind", "seed", "num_patches", "variation", "k", "rest", "s", "told", "steps", "training_slides", "question",
    "questions", *MEASURES,
)  # fmt: skip
NUM_PATCHES = 4096
NEW = settings(WORLD.feature_dim, TEXTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="directory of the slides' tokens and of the answers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", type=int, nargs="+", default=range(len(ARMS)), help="numbers in ARMS (default: all)")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--training-slides", type=int, default=4000)
    parser.add_argument("--variation", type=float, default=0.4, help="of patch types between slides (default 0.4)")
    parser.add_argument("--questions", type=int, default=300, help="of each kind, for the test")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    check_header(args.csv, COLUMNS)
    args.runs.mkdir(parents=True, exist_ok=True)
    arms = [ARMS[number] for number in args.arms]
    train = slides_of("train", args.training_slides, args, arms)
    test = slides_of("test", len(KINDS) * args.questions, args, arms)
    right: dict[Arm, list[NDArray[np.bool_]]] = {arm: [] for arm in arms}
    told = {"num_patches": NUM_PATCHES, "variation": args.variation, "k": K}
    told |= {"steps": args.steps, "training_slides": args.training_slides}
    for seed in args.seeds:
        for arm in arms:
            sizes = (args.variation, args.training_slides, len(test.items), args.steps)
            path = args.runs / f"{'-'.join(map(str, (arm.name, arm.s, seed, *sizes)))}.npy"
            if not path.exists():
                model, renderer = trained(arm, train, NEW, args.steps, seed)
                np.save(path, answered(model, renderer, arm, test))
                report(args.csv, told | {"kind": "seed", "seed": seed}, arm, [np.load(path)], None)
            right[arm].append(np.load(path))
    if len(args.seeds) > 1:
        for arm in arms:
            seeds = " ".join(map(str, args.seeds))
            report(args.csv, told | {"kind": "pooled", "seed": seeds}, arm, right[arm], right.get(ARMS[0]))


def slides_of(split: str, count: int, args: argparse.Namespace, arms: Sequence[Arm]) -> Slides:
    """The slides of a split, and what the arms show of them by the demo checkpoint's scorer."""
    scorer = frozen_scorer(trained_scorer(str(DEMO_CHECKPOINT)))
    assert isinstance(scorer, ScorerWeights)

    def show(number: int, slide: ShareSlide, missing: Sequence[Arm]) -> list[Shown]:
        features = torch.from_numpy(slide.features())
        phi = hidden_vectors(features, scorer) if any(arm.clusters == "k-means of phi" for arm in missing) else None
        return shown(features, apply_scorer(features, scorer), missing, number, phi)

    paths = {arm: args.runs / f"{split}-{count}-{args.variation}-{arm.rest}-{arm.s}.pt" for arm in arms}
    return Slides.made(paths, [ShareSlide(split, one, NUM_PATCHES, args.variation) for one in range(count)], show)


def report(
    csv: Path,
    told: dict[str, object],
    arm: Arm,
    right: Sequence[NDArray[np.bool_]],
    best: Sequence[NDArray[np.bool_]] | None,
) -> None:
    """Appends a row for each kind of question.

    Args:
        right: of each seed, [questions].
        best: the same of K best patches alone, to compare with.
    """
    for place, question in enumerate(KINDS):
        of_kind = np.stack(right)[:, place :: len(KINDS)]
        rival = None if best is None else np.stack(best)[:, place :: len(KINDS)]
        found = measures(of_kind, rival, np.arange(of_kind.shape[1]))
        row = told | {"rest": arm.rest, "s": arm.s, "told": arm.told, "question": question, "questions": of_kind.size}
        row |= found
        append_row(csv, {name: row[name] for name in COLUMNS})
        print(*(row[name] for name in ("kind", "seed", "rest", "s", "told", "question")), *found.values(), flush=True)


if __name__ == "__main__":
    main()
