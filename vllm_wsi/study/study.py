"""`vllm-wsi study`: the tables of a checkpoint on a question set. Which rule keeps what, and what that is worth."""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.checkpoint import loading
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.baselines import Selector, make_policy
from vllm_wsi.selection.scorer import PatchScorer
from vllm_wsi.selection.selector import Selection, frozen_scorer
from vllm_wsi.slides import FeatureFile
from vllm_wsi.slides.encoder_names import Mismatch
from vllm_wsi.stats import bootstrap_mean, gaussian_mutual_information, mcnemar, paired_bootstrap
from vllm_wsi.training.sparselearn import SparseLearn, SparseLearnSettings

from .judge import Judged, best_constant, judge, judge_blind, kept_and_dropped_means, select_all, with_positions
from .soft import judge_soft

Groups = Mapping[str, Sequence[SlideItem]]
"""Questions by the length of their slides, shortest first."""

LEARNED = "learned"
POLICY_NAMES = ("random", "uniform", "k-means", "farthest-point", "top-norm", "mmr")
K_SWEEP = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PAPER_BINS = (64, 128, 256, 512, 1024, 2048, 4096)
SOFT_PATCHES = 4096
INFORMATION_COMPONENTS = 4


@dataclass(frozen=True)
class KeepsK:
    """A rule at a K of its own."""

    rule: Selector
    k: int

    def select(self, slide: FeatureFile, k: int | None = None) -> Selection:
        return self.rule.select(slide, self.k)


class Study:
    """One checkpoint, asked the same questions under many rules of selection.

    Args:
        checkpoint: directory or hub name.
        groups: questions of multiple choice.
        out: directory for CSV files; made where it is missing.
        seed: of random selections and of all resampling.
        device: of the model, in the checkpoint's dtype; policies and the learned selection stay on the CPU.
        encoder_mismatch: of the learned selection.
    """

    def __init__(
        self,
        checkpoint: str,
        groups: Groups,
        out: str | Path,
        seed: int = 0,
        device: str = "cpu",
        encoder_mismatch: Mismatch = "refuse",
    ) -> None:
        with loading(checkpoint):
            model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint)
            self.renderer = ChatRenderer(AutoTokenizer.from_pretrained(checkpoint))
        self.model = model.to(device).eval()
        self.groups, self.out, self.seed, self.encoder_mismatch = groups, Path(out), seed, encoder_mismatch
        self.k = self.model.config.num_slide_tokens
        self.judged: dict[tuple[str, str], Judged] = {}  # (length, rule)
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self, k_sweep: Sequence[int] = K_SWEEP) -> None:
        """Writes all tables."""
        for name, table in (
            ("policies.csv", self.policies()),
            ("k_sweep.csv", self.k_sweep(k_sweep)),
            ("soft_hard.csv", self.soft_and_hard()),
            ("information.csv", self.information()),
        ):
            write_table(self.out / name, table)

    def rules(self) -> dict[str, Selector]:
        """The learned selection, every policy, and MMR of the learned scores."""
        found: dict[str, Selector] = {LEARNED: self.model.selector(self.encoder_mismatch)}
        found |= {name: make_policy(name, self.k, self.seed) for name in POLICY_NAMES}
        if isinstance(self.model.scorer, PatchScorer):
            weights = frozen_scorer(self.model.scorer)
            found["mmr of learned"] = make_policy("mmr", self.k, scorer=weights, relevance_weight=0.7)
        return found

    def policies(self) -> list[dict[str, Any]]:
        """Accuracy of every rule at the same K, in both position modes, and of answers without a slide."""
        rows = []
        for length, items in self.groups.items():
            chosen = select_all(items, self.rules(), self.k)
            slides = [item.slides[0].name for item in items]
            for mode in ("original", "packed"):
                model = with_positions(self.model, mode)
                found = {name: judge(model, self.renderer, items, chosen[name], self.k) for name in chosen}
                if mode == self.model.config.position_ids:
                    self.judged |= {(length, name): judged for name, judged in found.items()}
                right = {name: judged.correct for name, judged in found.items()}
                right["blind"] = judge_blind(model, self.renderer, items)
                letter, constant = best_constant(items)
                right[f"always {letter}"] = constant
                for name, correct in right.items():
                    row = self._accuracy(correct, slides)
                    less = paired_bootstrap(correct, right[LEARNED], slides, seed=self.seed)
                    difference = ("minus_learned", "minus_learned_low", "minus_learned_high")
                    row |= dict(zip(difference, map(rounded, less), strict=True))
                    row["mcnemar_p"] = rounded(mcnemar(correct, right[LEARNED]))
                    if name in found:
                        recall = found[name].recall
                        row["key_patch_recall"] = "" if recall is None else rounded(recall.mean())
                        row["redundancy"] = rounded(float(np.nanmean(found[name].redundancy)))
                    rows.append({"length": length, "positions": mode, "rule": name, "k": self.k} | row)
        return rows

    def k_sweep(self, sizes: Sequence[int]) -> list[dict[str, Any]]:
        """Accuracy of the learned selection by K, without retraining."""
        rows = []
        for length, items in self.groups.items():
            slides = [item.slides[0].name for item in items]
            rules = {str(k): KeepsK(self.model.selector(self.encoder_mismatch), k) for k in sizes}
            chosen = select_all(items, rules, self.k)
            for k in sizes:
                judged = judge(self.model, self.renderer, items, chosen[str(k)], k)
                recall = "" if judged.recall is None else rounded(judged.recall.mean())
                rows.append({"length": length, "k": k} | self._accuracy(judged.correct, slides) | {"recall": recall})
        return rows

    def soft_and_hard(self) -> list[dict[str, Any]]:
        """One scorer, judged through the noise gate (tau where it ends, K as served) and by Hard Top-K.

        Without a denoiser: a checkpoint holds none. The ablations judge each arm through its own.
        """
        rows = []
        for length, items in self.groups.items():
            longest = max(source_length(item) for item in items)
            if longest > SOFT_PATCHES:
                continue  # all patches would have to pass the decoder
            slides = [item.slides[0].name for item in items]
            settings = SparseLearnSettings(num_slide_tokens=self.k, denoiser="none")
            gate = SparseLearn(self.model.config.feature_dim, settings)
            soft = judge_soft(self.model, self.renderer, items, gate, SOFT_PATCHES, self.seed)
            hard = self._learned(length, items).correct
            gap = paired_bootstrap(hard, soft.correct, slides, seed=self.seed)
            names = ("hard_minus_soft", "hard_minus_soft_low", "hard_minus_soft_high")
            rows.append(
                {"length": length, "questions": len(items), "k": self.k, "tau": settings.tau_end, "denoiser": "none"}
                | {"hard_accuracy": rounded(hard.mean()), "soft_accuracy": rounded(soft.correct.mean())}
                | dict(zip(names, map(rounded, gap), strict=True))
                | {"soft_mass_on_hard": rounded(soft.mass_on_hard.mean())}
                | {"effective_soft_tokens": rounded(soft.effective_tokens.mean())}
            )
        return rows

    def information(self) -> list[dict[str, Any]]:
        """Mutual information between what is kept of a slide and what is dropped (`gaussian_mutual_information`)."""
        rows = []
        for length, items in self.groups.items():
            if len(items) < 8 * INFORMATION_COMPONENTS:
                continue  # an estimate over fewer slides means nothing
            for name in (LEARNED, "random", "top-norm", "k-means"):
                if (length, name) not in self.judged:
                    continue
                kept, dropped = kept_and_dropped_means(items, self.judged[length, name].selections)
                if len(kept) < 8 * INFORMATION_COMPONENTS:
                    continue
                nats, noise = gaussian_mutual_information(kept, dropped, INFORMATION_COMPONENTS, seed=self.seed)
                row = {"mutual_information_nats": rounded(nats), "noise_nats": rounded(noise)}
                rows.append({"length": length, "rule": name, "slides": len(kept)} | row)
        return rows

    def _learned(self, length: str, items: Sequence[SlideItem]) -> Judged:
        if (length, LEARNED) not in self.judged:
            chosen = select_all(items, {LEARNED: self.model.selector(self.encoder_mismatch)}, self.k)[LEARNED]
            self.judged[length, LEARNED] = judge(self.model, self.renderer, items, chosen, self.k)
        return self.judged[length, LEARNED]

    def _accuracy(self, correct: np.ndarray, slides: list[str]) -> dict[str, Any]:
        accuracy = bootstrap_mean(correct, slides, seed=self.seed)
        names = ("accuracy", "low", "high")
        return {"questions": len(correct)} | dict(zip(names, map(rounded, accuracy), strict=True))


def by_length(items: Sequence[SlideItem], bins: Sequence[int] = PAPER_BINS) -> dict[str, list[SlideItem]]:
    """Questions in the bins of slide length that the paper's figure uses; empty ones are left out."""
    edges = (0, *bins)
    names = [*(f"{low}-{high}" for low, high in zip(edges, bins, strict=False)), f">={bins[-1]}"]
    found: dict[str, list[SlideItem]] = {name: [] for name in names}
    for item in items:
        found[names[int(np.searchsorted(bins, source_length(item), side="right"))]].append(item)
    return {name: part for name, part in found.items() if part}


def source_length(item: SlideItem) -> int:
    """Patches of an item's longest slide."""
    lengths = []
    for source in item.slides:
        known = getattr(source, "num_patches", None)
        if known is None:
            with source.open() as slide:
                known = slide.num_patches
        lengths.append(known)
    return max(lengths)


def rounded(value: float) -> float:
    return round(float(value), 4)


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV file with the columns of all rows; nothing where there is no row."""
    rows = list(rows)
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def write_origin(path: Path, arguments: Mapping[str, Any], seconds: float) -> None:
    """What was run, with what, for how long."""
    packages = ("vllm-wsi", "torch", "transformers", "numpy", "scikit-learn")
    origin = {
        "time_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "arguments": dict(arguments),
        "seconds": round(seconds),
        "machine": {"system": platform.system(), "processor": processor(), "cores": len(os.sched_getaffinity(0))},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
    }
    path.write_text(json.dumps(origin, indent=2) + "\n")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
