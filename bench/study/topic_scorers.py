"""What a scorer that hears the question is worth: `python -m bench.study.topic_scorers RUNS --seeds 0 1 2`.

A world of eight topics (`haystack/topics.py`), one of which a question asks about. For each seed (world, weights and
data) a small decoder first learns to read short, clean bags; behind it two scorers learn from the answers, by the same
SparseLearn, data and steps: one without the question and one that hears it; and the first one with three times the
steps. All are judged on the same test slides at K = 32: random patches, each scorer's, those of the scorers without the
question made diverse (MMR), the oracle's (key patches alone), and the best that a rule without the question could do
that knows the world's densities: the likeliest K / 8 patches of each topic. It takes about 20 minutes a seed on one
core.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from bench.common.record import RESULTS, append_row, check_header
from vllm_wsi.haystack.generator import NONE
from vllm_wsi.haystack.recipe import GENERATORS
from vllm_wsi.haystack.topics import NUM_COMMON, TOPICS, TopicWorld, topic_items
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.selection.baselines import Policy, make_policy
from vllm_wsi.selection.patch_matrix import Patches
from vllm_wsi.stats import mean_interval
from vllm_wsi.study.calibrate import selected
from vllm_wsi.study.judge import judge, select_all
from vllm_wsi.study.study import DIVERSE, LEARNED, made_diverse

from .scorer_arms import begin_with, trained

CSV = RESULTS / "study" / "topic_scorers.csv"
COLUMNS = (
    "seed", "k", "steps", "num_patches", "questions", "arm", "accuracy", "accuracy_low", "accuracy_high",
    "key_patch_recall", "kept_at_least_one",
)  # fmt: skip
K, D = 32, 64
IDEAL = "ideal, question-free"
TEST = {4096: 128, 16_384: 64}
PATCH = {"kind": "patch", "hidden_size": 128}
QUESTION = {"kind": "question", "hidden_size": 128, "rank": 16, "free_tokens": 8}
TEXTS = [*(f"user\nWhich {topic} is on this slide?\nassistant\n" + "\n".join(names) for topic, names in TOPICS.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="directory of the training runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--decoder-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=240, help="of the scorers (default 240)")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    for seed in args.seeds:
        runs = args.runs / str(seed)
        decoder = decoder_of(runs / "decoder", seed, args.decoder_steps)
        arms = {
            ("question-free", args.steps): PATCH,
            ("question-free", 3 * args.steps): PATCH,
            ("question", args.steps): QUESTION,
        }
        for (arm, steps), scorer in arms.items():
            checkpoint = scorer_of(runs / f"{arm}-{steps}", decoder, scorer, seed, steps)
            for row in judged(checkpoint, arm, seed):
                append_row(args.csv, {"seed": seed, "k": K, "steps": steps} | row)


def decoder_of(run: Path, seed: int, steps: int, absent_share: float = 0.0) -> Path:
    """A decoder and a projector that read bags of 32 to 64 patches, every topic among them."""
    bags = {
        "name": "topics", "count": 32 * steps, "num_patches": [32, 64], "most_share": 0.125, "seed": seed,
        "absent_share": absent_share,
    }  # fmt: skip
    new = {
        "feature_dim": D, "hidden_size": 128, "num_layers": 2, "max_position_embeddings": 139_264,
        "max_slide_positions": 135_168, "rope_theta": 1e6, "scorer_hidden_size": 128, "initializer_range": 0.05,
        "num_slide_tokens": K, "texts": [*TEXTS, *([NONE] if absent_share else [])],
    }  # fmt: skip
    stage = {
        "name": "decoder", "data": data(bags), "train": ["projector", "decoder"], "steps": steps, "batch_size": 32,
        "warmup_steps": 50, "learning_rate": {"projector": 1e-3, "decoder": 1e-3},
    }  # fmt: skip
    return trained(run, {"new": new}, [stage], seed, GENERATORS)


# Many parameters: what is trained, behind what, on what.
def scorer_of(
    run: Path, decoder: Path, scorer: dict[str, Any], seed: int, steps: int, absent_share: float = 0.0
) -> Path:
    """That decoder with a scorer that learned from the answers."""
    slides = {"name": "topics", "count": 16 * steps, "first": 1_000_000, "num_patches": 512, "seed": seed}
    slides["absent_share"] = absent_share
    stage = {
        "name": "scorer", "data": data(slides), "train": ["scorer", "projector"], "steps": steps, "batch_size": 16,
        "sparselearn": {"num_slide_tokens": K, "k_start": 256, "k_end": 8},
        "learning_rate": {"scorer": 2e-3, "denoiser": 2e-3, "projector": 1e-3},
    }  # fmt: skip
    start = begin_with(run.parent / f"start-{scorer['kind']}", decoder, scorer, seed)
    return trained(run, {"checkpoint": str(start)}, [stage], seed, GENERATORS)


def data(generate: dict[str, Any]) -> dict[str, Any]:
    return {"generate": generate | {"feature_dim": D}, "stretch_positions": 131_072, "mix_positions": True}


def judged(checkpoint: Path, arm: str, seed: int) -> list[dict[str, Any]]:
    """The rows of one checkpoint, with those policies beside it that need no other."""
    model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval()
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(checkpoint))
    rows = []
    for num_patches, count in TEST.items():
        items = topic_items("test", count, num_patches, feature_dim=D, seed=seed)
        if arm == "question":
            chosen = {arm: [[selected(model, renderer, item)] for item in items]}
        else:
            policies = {LEARNED: model.selector(), "random": make_policy("random", K)} | made_diverse(model, K)
            policies[IDEAL] = EachTopic(K, TopicWorld(seed=seed, feature_dim=D))
            chosen = select_all(items, policies, K)
            names = {LEARNED: arm, DIVERSE: f"{arm}, MMR", "random": "random", "oracle": "oracle", IDEAL: IDEAL}
            chosen = {names[name]: selections for name, selections in chosen.items()}
        for name, selections in chosen.items():
            found = judge(model, renderer, items, selections, K)
            assert found.key_patch_recall is not None
            accuracy = mean_interval(found.correct.astype(float))
            values = (accuracy.estimate, accuracy.low, accuracy.high, found.key_patch_recall.mean())
            rows.append(
                {"num_patches": num_patches, "questions": count, "arm": name}
                | dict(zip(COLUMNS[6:10], (round(float(one), 3) for one in values), strict=True))
                | {"kept_at_least_one": round(float(np.mean(found.key_patch_recall > 0)), 3)}
            )
            print(seed, rows[-1], flush=True)
    return rows


@dataclass(frozen=True)
class EachTopic(Policy):
    """K / 8 patches of each topic: those of the largest log density ratio of its findings against all other types."""

    world: TopicWorld

    def _pick(self, patches: Patches, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        centres = torch.from_numpy(self.world.centres)
        logs = patches.features @ centres.T / self.world.noise**2  # up to what all types share: |centre|^2 = d
        findings = logs[:, NUM_COMMON:].unflatten(1, (len(TOPICS), -1))
        best: list[int] = []
        for topic in range(len(TOPICS)):
            others = torch.cat(
                (logs[:, :NUM_COMMON], findings[:, torch.arange(len(TOPICS)) != topic].flatten(1)), dim=1
            )
            ratio = findings[:, topic].logsumexp(dim=1) - others.logsumexp(dim=1)
            ratio[best] = -torch.inf
            best += ratio.topk(k // len(TOPICS)).indices.tolist()
        return torch.tensor(best), torch.zeros(len(best))


if __name__ == "__main__":
    main()
