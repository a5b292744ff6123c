"""What the 32 best tiles leave out, on real tissue: `python -m bench.study.tissue_summary RUNS --tissue-dir DIR`.

As `bench.study.summary_tokens`, on slides pooled from the tiles of Kather et al. 2016 (`tissue_shares.py`). In each
fold, source slides are left out. Training slides are pooled from tiles of the others. Test slides are pooled from
other tiles of the same source slides («seen sources»), or from tiles of those left out («left-out sources»). The scorer
tells tumour, lymphocytes and debris from the other classes. It learned from the tiles' labels, and never scores
a tile of a source slide that it learned from: each source slide that is not left out has a scorer of its own.

Rows of the kind "seed" are of one fold and one decoder, with pooled slides as the units. Rows of the kind "pooled" are
of all folds and decoders. There the unit is the source slide that comes first on a pooled slide (ten in all), since
pooled slides share tiles. So few units make intervals too narrow rather than too wide. Tokens and answers are made once
and kept in RUNS. It takes about a minute for the tokens of a fold, and one for each arm, fold and seed, on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bench.common.record import RESULTS, append_row, check_header
from vllm_wsi.selection.scorer import PatchScorer
from vllm_wsi.tissue.pooled_slides import PatchPool

from .share_slides import KINDS
from .summary_arms import ARMS, Arm, K, Shown, shown
from .summary_decoder import MEASURES, Slides, answered, measures, settings, trained
from .tissue_shares import (
    CLASSES,
    FEATURE_DIM,
    FINDINGS,
    FOLDS,
    LEFT_OUT,
    NUM_PATCHES,
    TESTS,
    TEXTS,
    TissueShareSlide,
    fold_pools,
)

CSV = RESULTS / "study" / "tissue_summary.csv"
COLUMNS = (
    "kind", "left_out", "tested_on", "seed", "num_patches", "k", "rest", "s", "steps", "training_slides", "question",
    "questions", *MEASURES, "kept_at_least_one", "repeated_tiles", "most_times",
)  # fmt: skip
MAIN_ARMS = (0, 21, 24, 3)  # of `ARMS`
CLOSE = 0.1  # a lead in prevalence
SCORER = {"hidden_size": 64, "steps": 50, "rate": 3e-3, "weight_decay": 0.1}
NEW = settings(FEATURE_DIM, TEXTS).changed(initializer_range=0.1)  # as the recipe `kather`; 0.05 learns later here
Right = dict[Arm, list[list[NDArray[np.bool_]]]]
"""Of each arm, for each fold and each seed, [questions]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="directory of the slides' tokens and of the answers")
    parser.add_argument("--tissue-dir", type=Path, required=True)
    parser.add_argument("--folds", type=int, nargs="+", default=range(len(FOLDS)), help="numbers in FOLDS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", type=int, nargs="+", default=MAIN_ARMS, help="numbers in ARMS, 0 first")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--training-slides", type=int, default=4000)
    parser.add_argument("--questions", type=int, default=200, help="of each kind and fold, for the test")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    check_header(args.csv, COLUMNS)
    args.runs.mkdir(parents=True, exist_ok=True)
    told = {"num_patches": NUM_PATCHES, "k": K, "steps": args.steps, "training_slides": args.training_slides}
    arms = [ARMS[number] for number in args.arms]
    tested: dict[str, list[Tested]] = {name: [] for name in TESTS}
    right: dict[str, Right] = {name: {arm: [] for arm in arms} for name in TESTS}
    for fold in args.folds:
        pools = fold_pools(args.tissue_dir, FOLDS[fold])
        scores = unseen_scores(pools)
        train, _ = slides_of(args.runs, pools["train"], scores, args.training_slides, arms)
        tests = {}
        for name in TESTS:
            tests[name], slides = slides_of(args.runs, pools[name], scores, len(KINDS) * args.questions, arms)
            tested[name].append(Tested(slides, scores))
            for arm in arms:
                right[name][arm].append([])
        for seed in args.seeds:
            for arm in arms:
                sizes = (fold, seed, args.training_slides, args.questions, args.steps)
                path = args.runs / f"{'-'.join(map(str, (arm.name, arm.s, *sizes)))}.npz"
                is_new = not path.exists()
                if is_new:
                    model, renderer = trained(arm, train, NEW, args.steps, seed)
                    np.savez(path, **{name: answered(model, renderer, arm, test) for name, test in tests.items()})
                for name, found in np.load(path).items():
                    right[name][arm][-1].append(found)
                    if is_new:
                        one = told | {
                            "kind": "seed",
                            "left_out": " ".join(FOLDS[fold]),
                            "tested_on": name,
                            "seed": seed,
                        }
                        report(args.csv, one, arm, {arm: [[found]]}, tested[name][-1:])
    told |= {"kind": "pooled", "left_out": " | ".join(" ".join(FOLDS[fold]) for fold in args.folds)}
    told |= {"seed": " ".join(map(str, args.seeds))}
    for name in TESTS:
        for arm in arms:
            report(args.csv, told | {"tested_on": name}, arm, right[name], tested[name])


def unseen_scores(pools: dict[str, PatchPool]) -> Tensor:
    """fp32 [n]: each tile's score by a scorer that saw no tile of its source slide.

    Tiles of the sources left out share one scorer, which learned from all others. Tiles of all sides are scored alike,
    so that a decoder learns from selections as good as those of the test.
    """
    train, out = pools["train"], pools[LEFT_OUT].rows
    scores, sources = torch.empty(len(train.labels)), train.patients[train.rows]
    for source in np.unique(sources):
        own = np.flatnonzero(train.patients == source)
        scores[own] = scored(fitted_scorer(train, train.rows[sources != source]), train, own)
    scores[out] = scored(fitted_scorer(train, train.rows), train, out)
    return scores


def fitted_scorer(pool: PatchPool, rows: NDArray[np.int64]) -> PatchScorer:
    """Tells the findings' tiles from all others; each class weighs the same."""
    torch.manual_seed(0)
    scorer = PatchScorer(FEATURE_DIM, int(SCORER["hidden_size"]))
    optimiser = torch.optim.AdamW(scorer.parameters(), lr=SCORER["rate"], weight_decay=SCORER["weight_decay"])
    x, labels = torch.from_numpy(pool.views[0][rows].astype(np.float32)), pool.labels[rows]
    wanted = torch.from_numpy(np.isin(labels, [CLASSES.index(name) for name in FINDINGS.values()])).float()
    weights = torch.from_numpy(1 / np.bincount(labels, minlength=len(CLASSES))[labels]).float()
    for _ in range(int(SCORER["steps"])):
        loss = F.binary_cross_entropy_with_logits(scorer(x), wanted, weights, reduction="sum") / weights.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return scorer


@torch.no_grad()
def scored(scorer: PatchScorer, pool: PatchPool, rows: NDArray[np.int64]) -> Tensor:
    found: Tensor = scorer(torch.from_numpy(pool.views[0][rows].astype(np.float32)))
    return found


def slides_of(
    runs: Path, pool: PatchPool, scores: Tensor, count: int, arms: Sequence[Arm]
) -> tuple[Slides, list[TissueShareSlide]]:
    """(questions about slides of a pool and what arms show of them, the slides).

    Args:
        scores: of all tiles.
    """

    def show(number: int, slide: TissueShareSlide, missing: Sequence[Arm]) -> list[Shown]:
        return shown(torch.from_numpy(slide.features()), scores[slide.made.rows], missing, number)

    slides = [TissueShareSlide(pool, number) for number in range(count)]
    paths = {arm: runs / f"{pool.name}-{count}-{arm.rest}-{arm.s}.pt" for arm in arms}
    return Slides.made(paths, slides, show), slides


class Tested:
    """The test slides of a fold."""

    def __init__(self, slides: list[TissueShareSlide], scores: Tensor) -> None:
        self.slides, self._scores = slides, scores
        times = [np.unique(slide.made.rows, return_counts=True)[1] for slide in slides]
        self.repeated = float(np.mean([slide.num_repeated / slide.num_patches for slide in slides]))
        self.most_times = max(int(one.max()) for one in times)

    def places(self, question: str) -> list[int]:
        """Slides about which the question is asked; «, close» are those with a narrow lead."""
        kind, _, part = question.partition(", ")
        of_kind = [number for number, slide in enumerate(self.slides) if slide.kind == kind]
        return [number for number in of_kind if not part or self.slides[number].made.lead < CLOSE]

    def holds_key(self, number: int, kept: int) -> bool:
        """Whether the best tiles hold one of the finding's."""
        slide = self.slides[number]
        best = self._scores[slide.made.rows].argsort(descending=True, stable=True)[:kept]
        return bool(np.isin(best.numpy(), slide.made.key_tiles).any())


def report(csv: Path, told: dict[str, object], arm: Arm, right: Right, tested: Sequence[Tested]) -> None:
    """Appends a row for each question.

    Args:
        right: where it also has K best tiles alone, the arm is compared with them.
        tested: of each fold.
    """
    for question in (KINDS[0], f"{KINDS[0]}, close", *KINDS[1:]):
        places = [one.places(question) for one in tested]
        of_arm, best = (
            np.concatenate([np.stack(one)[:, at] for one, at in zip(right[which], places, strict=True)], axis=1)
            if which in right
            else None
            for which in (arm, ARMS[0])
        )
        assert of_arm is not None
        units = [
            one.slides[at].made.source if told["kind"] == "pooled" else one.slides[at].name
            for one, of_fold in zip(tested, places, strict=True)
            for at in of_fold
        ]
        row = told | {"rest": arm.rest, "s": arm.s, "question": question, "questions": of_arm.size}
        rival = best if told["kind"] == "pooled" and arm != ARMS[0] else None
        row |= measures(of_arm, rival, units)
        kept = [one.holds_key(at, K - arm.s) for one, of_fold in zip(tested, places, strict=True) for at in of_fold]
        row["kept_at_least_one"] = round(float(np.mean(kept)), 3) if question == "finding" else ""
        row["repeated_tiles"] = round(float(np.mean([one.repeated for one in tested])), 3)
        row["most_times"] = max(one.most_times for one in tested)
        append_row(csv, {name: row[name] for name in COLUMNS})
        shown_columns = (
            "kind",
            "left_out",
            "tested_on",
            "seed",
            "rest",
            "s",
            "question",
            *MEASURES,
            "kept_at_least_one",
        )
        print(*(row[name] for name in shown_columns), flush=True)


if __name__ == "__main__":
    main()
