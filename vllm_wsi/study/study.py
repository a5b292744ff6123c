"""The tables of a study: one checkpoint answers the same questions from what each selection policy keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from vllm_wsi.files import write_csv
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.checkpoint import loading
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.baselines import Selector, make_policy
from vllm_wsi.selection.scorer import PatchScorer, frozen_scorer
from vllm_wsi.selection.selection import Selection
from vllm_wsi.slides import FeatureFile
from vllm_wsi.slides.encoder_names import Mismatch
from vllm_wsi.stats import Interval, holm, mean_interval, paired_interval, paired_p
from vllm_wsi.training.sparselearn import SparseLearn, SparseLearnSettings

from .groups import Groups, longest_slide, slide_names
from .judge import Judged, best_constant, judge, judge_blind, kept_and_dropped_means, select_all, with_positions
from .mutual_information import gaussian_mutual_information
from .soft import judge_soft
from .study_model import study_model
from .table_numbers import rounded, significant

LEARNED = "learned"
"""The policy that keeps the K patches with the highest scores of the checkpoint's scorer."""

DIVERSE = "mmr of learned"
"""The same scores, but a patch counts for less the more it resembles one that is kept already (MMR)."""

POLICY_NAMES = ("random", "uniform", "k-means", "farthest-point", "top-norm", "mmr")
"""Policies without training that are compared with the learned one; "oracle" joins them where key patches are known."""

K_SWEEP = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SOFT_PATCHES = 4096
"""The longest slides that are judged through the soft path, as it sends every patch through the decoder."""

INFORMATION_COMPONENTS = 4


@dataclass(frozen=True)
class FixedK:
    """A policy that keeps its own number of patches, whatever K it is asked for."""

    policy: Selector
    k: int

    def select(self, slide: FeatureFile, k: int | None = None) -> Selection:
        return self.policy.select(slide, self.k)


def made_diverse(model: SparseWSIForConditionalGeneration, k: int) -> dict[str, Selector]:
    """`DIVERSE` alone; nothing where the scorer does not score single patches."""
    if not isinstance(model.scorer, PatchScorer):
        return {}
    return {DIVERSE: make_policy("mmr", k, scorer=frozen_scorer(model.scorer), relevance_weight=0.7)}


class Study:
    """One checkpoint, asked the same questions under many selection policies.

    Args:
        checkpoint: directory or hub name.
        groups: multiple-choice questions.
        out: directory for CSV files; made where it is missing.
        seed: of the random policies and of all resampling.
        device: where the model answers, in the checkpoint's dtype; every policy selects on the CPU.
        encoder_mismatch: "allow" lets the learned policy select from features of another encoder.
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
            model = study_model(checkpoint)
            self.renderer = ChatRenderer(AutoTokenizer.from_pretrained(checkpoint))
        self.model = model.to(device).eval()
        self.groups, self.out, self.seed, self.encoder_mismatch = groups, Path(out), seed, encoder_mismatch
        self.slides = slide_names(groups)  # of each question: what intervals and tests resample
        self.k = self.model.config.num_slide_tokens
        self.judged: dict[tuple[str, str], Judged] = {}  # by (group, policy)
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self, k_sweep: Sequence[int] = K_SWEEP) -> None:
        """Writes all tables; a table without a row is left out."""
        for name, rows in (
            ("policies.csv", self.policy_rows()),
            ("k_sweep.csv", self.k_sweep_rows(k_sweep)),
            ("soft_hard.csv", self.soft_and_hard_rows()),
            ("information.csv", self.information_rows()),
        ):
            if rows:
                write_csv(self.out / name, rows)

    def policies(self) -> dict[str, Selector]:
        """The learned scorer, the policies without training, and MMR with the learned scores."""
        found: dict[str, Selector] = {LEARNED: self.model.selector(self.encoder_mismatch)}
        found |= {name: make_policy(name, self.k, self.seed) for name in POLICY_NAMES}
        return found | made_diverse(self.model, self.k)

    def policy_rows(self) -> list[dict[str, Any]]:
        """Accuracy of every policy at the same K, in both position modes, and of answers without a slide.

        Each but the learned one is tested against it; `p_holm` is corrected for all rows of the table.
        """
        rows = []
        for length, items in self.groups.items():
            chosen = select_all(items, self.policies(), self.k)
            slides = self.slides[length]
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
                    row = {"length": length, "positions": mode, "policy": name, "k": self.k}
                    row |= self._accuracy(correct, slides)
                    if name != LEARNED:
                        row |= self._paired("minus_learned", correct, right[LEARNED], slides)
                    if name in found:
                        row |= self._recall(found[name], slides)
                        row["redundancy"] = rounded(float(np.nanmean(found[name].redundancy)))
                    rows.append(row)
        return with_holm(rows)

    def k_sweep_rows(self, sizes: Sequence[int]) -> list[dict[str, Any]]:
        """Accuracy of the learned policy at several K, without retraining."""
        rows = []
        for length, items in self.groups.items():
            slides = self.slides[length]
            policies = {str(k): FixedK(self.model.selector(self.encoder_mismatch), k) for k in sizes}
            chosen = select_all(items, policies, self.k)
            for k in sizes:
                judged = judge(self.model, self.renderer, items, chosen[str(k)], k)
                row = {"length": length, "k": k} | self._accuracy(judged.correct, slides)
                rows.append(row | self._recall(judged, slides))
        return rows

    def soft_and_hard_rows(self) -> list[dict[str, Any]]:
        """The same scorer through the noise gate (tau at its last value, K as served) and by Hard Top-K.

        The gate has no denoiser, as a checkpoint holds none; the ablations judge each arm through its own denoiser.
        """
        rows = []
        for length, items in self.groups.items():
            longest = max(longest_slide(item) for item in items)
            if longest > SOFT_PATCHES:
                continue
            slides = self.slides[length]
            settings = SparseLearnSettings(num_slide_tokens=self.k, denoiser="none")
            gate = SparseLearn(self.model.config.feature_dim, settings)
            learned = self._learned(length, items)
            soft = judge_soft(self.model, self.renderer, items, gate, learned.selections, SOFT_PATCHES, self.seed)
            rows.append(
                {"length": length, "questions": len(items), "k": self.k, "tau": settings.tau_end, "denoiser": "none"}
                | {"hard_accuracy": rounded(learned.correct.mean()), "soft_accuracy": rounded(soft.correct.mean())}
                | self._paired("hard_minus_soft", learned.correct, soft.correct, slides)
                | _named("soft_mass_on_hard", mean_interval(soft.mass_on_hard, slides, seed=self.seed))
                | {"effective_soft_tokens": rounded(soft.effective_tokens.mean())}
            )
        return with_holm(rows)

    def information_rows(self) -> list[dict[str, Any]]:
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
                rows.append({"length": length, "policy": name, "slides": len(kept)} | row)
        return rows

    def _learned(self, length: str, items: Sequence[SlideItem]) -> Judged:
        if (length, LEARNED) not in self.judged:
            chosen = select_all(items, {LEARNED: self.model.selector(self.encoder_mismatch)}, self.k)[LEARNED]
            self.judged[length, LEARNED] = judge(self.model, self.renderer, items, chosen, self.k)
        return self.judged[length, LEARNED]

    def _accuracy(self, correct: np.ndarray, slides: list[str]) -> dict[str, Any]:
        accuracy = mean_interval(correct, slides, seed=self.seed)
        return {"questions": len(correct)} | dict(zip(("accuracy", "low", "high"), map(rounded, accuracy), strict=True))

    def _recall(self, judged: Judged, slides: list[str]) -> dict[str, Any]:
        """Of the questions whose key patches are known."""
        if mean_recall(judged) == "":
            return dict.fromkeys(("key_patch_recall", "key_patch_recall_low", "key_patch_recall_high"), "")
        assert judged.key_patch_recall is not None
        known = np.flatnonzero(np.isfinite(judged.key_patch_recall))
        of = [slides[number] for number in known]
        return _named("key_patch_recall", mean_interval(judged.key_patch_recall[known], of, seed=self.seed))

    def _paired(self, name: str, first: np.ndarray, second: np.ndarray, slides: list[str]) -> dict[str, Any]:
        gap = paired_interval(first, second, slides, seed=self.seed)
        return _named(name, gap) | {"p": significant(paired_p(first, second, slides, self.seed))}


def mean_recall(judged: Judged) -> float | str:
    """The mean share of the key patches that was kept, as a table shows it; "" where no question has known ones."""
    known = judged.key_patch_recall
    return "" if known is None or np.isnan(known).all() else rounded(float(np.nanmean(known)))


def with_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows; behind each p stands Holm's correction of it for all p-values of these rows."""
    corrected = iter(holm([row["p"] for row in rows if "p" in row]))
    found = []
    for row in rows:
        pairs = list(row.items())
        if "p" in row:
            pairs.insert(list(row).index("p") + 1, ("p_holm", significant(next(corrected))))
        found.append(dict(pairs))
    return found


def _named(name: str, interval: Interval) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(rounded, interval), strict=True))
