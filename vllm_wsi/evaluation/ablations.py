"""The switches of the training path, each trained from the same start over several seeds."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, set_seed

from vllm_wsi.chat import ChatEncoder
from vllm_wsi.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.sparsify.scorer import seeded_scorer
from vllm_wsi.sparsify.sparselearn import SparseLearnSettings
from vllm_wsi.training.settings import TrainSettings
from vllm_wsi.training.train import Generators, make_dataset, run_stage, train

from .judge import judge, select_all
from .soft import judge_soft
from .study import LEARNED, SOFT_PATCHES, Groups, rounded, source_length

ARMS: dict[str, dict[str, Any]] = {
    "noise gate, diagonal denoiser": {},
    "noise gate, no denoiser": {"denoiser": "none"},
    "noise gate, global denoiser": {"denoiser": "global"},
    "scale gate, diagonal denoiser": {"gate": "scale"},
    "no gate": {"gate": "none", "denoiser": "none"},
    "Gumbel straight-through": {"relaxation": "gumbel"},
    "K ends at 32": {"kept_end": None},
}
"""Changes to the paper's settings: noise gate, diagonal denoiser, LapSum."""


def run_ablations(
    settings: TrainSettings, groups: Groups, generators: Generators, seeds: Sequence[int], work: Path
) -> Iterator[dict[str, Any]]:
    """Trains the last stage of `settings` once for every arm and seed; yields one row for each and each length.

    Args:
        settings: whose last stage has `sparselearn`; the stages before it are run once, and every arm starts from
            what they give, with a scorer of its own seed.
        groups: questions that no stage was trained on.
        work: directory for the common start; a finished one is used again.
    """
    stage = settings.stages[-1]
    if stage.sparselearn is None:
        raise ValueError(f"stage {stage.name}: found no sparselearn, wanted it in the last stage of an ablation")
    base = work / "checkpoint"
    if not base.is_dir():
        base = train(settings.model_copy(update={"stages": settings.stages[:-1]}), work, generators)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(base))
    for seed in seeds:
        for arm, changes in ARMS.items():
            began = time.monotonic()
            ours = stage.sparselearn
            paper = SparseLearnSettings(ours.num_kept, kept_start=ours.kept_start, kept_end=ours.kept_end)
            gate = replace(paper, **changes)
            changed = stage.model_copy(
                update={
                    "sparselearn": gate,
                    "learning_rate": {"denoiser": stage.learning_rate["scorer"]} | stage.learning_rate,
                }
            )
            model = SparseWSIForConditionalGeneration.from_pretrained(base)
            config = model.config
            model.scorer = seeded_scorer(feature_dim=config.feature_dim, seed=seed, **config.scorer)
            set_seed(seed)
            dataset = make_dataset(changed.data, encoder, config, seed, generators)
            folder = Path(tempfile.mkdtemp(dir=work))
            try:
                run = settings.model_copy(update={"seed": seed})
                run_stage(model, changed, dataset, encoder.tokenizer, folder, 0, run)
            finally:
                shutil.rmtree(folder)
            seconds = time.monotonic() - began
            yield from _judge_arm(model.eval(), encoder, groups, gate, arm, seed, seconds)


def _judge_arm(
    model: SparseWSIForConditionalGeneration,
    encoder: ChatEncoder,
    groups: Groups,
    gate: SparseLearnSettings,
    arm: str,
    seed: int,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    k = model.config.num_slide_tokens
    for length, items in groups.items():
        chosen = select_all(items, {LEARNED: model.selector()}, k)
        found = {name: judge(model, encoder, items, selections, k) for name, selections in chosen.items()}
        recall = found[LEARNED].recall
        row = {
            "arm": arm,
            "seed": seed,
            "length": length,
            "questions": len(items),
            "accuracy": rounded(found[LEARNED].correct.mean()),
            "oracle_accuracy": rounded(found["oracle"].correct.mean()) if "oracle" in found else "",
            "evidence_recall": "" if recall is None else rounded(recall.mean()),
            "soft_accuracy_without_denoiser": "",
            "training_seconds": round(seconds, 1),
        }
        if max(source_length(item) for item in items) <= SOFT_PATCHES // 4:
            row["soft_accuracy_without_denoiser"] = rounded(judge_soft(model, encoder, items, gate).correct.mean())
        yield row
