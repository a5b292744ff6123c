"""One checkpoint on slides of real tissue, whose patients training never saw: every policy's 32, and the answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

from vllm_wsi.errors import SettingsError
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.checkpoint import loading
from vllm_wsi.selection.baselines import OraclePolicy, Selector, UniformPolicy, make_policy
from vllm_wsi.selection.selection import Selection
from vllm_wsi.selection.selection_measures import key_patch_recall
from vllm_wsi.slides import FeatureFile
from vllm_wsi.tissue.pooled_slides import PooledSlide, TumourSlide, natural_slides
from vllm_wsi.tissue.tissue_generator import near_whole_slide, tissue_pool
from vllm_wsi.tissue.tissue_patches import IDC_PATCHES, tissue_archive
from vllm_wsi.tissue.tissue_questions import ask, tissue_item

from .study import LEARNED
from .study_model import study_model
from .table_numbers import rounded
from .tissue_answering import Asked, scored, write_answers
from .tissue_measures import auc
from .tissue_probe import fit_probe
from .tissue_settings import ALL, NATURAL, TissueStudySettings

logger = logging.getLogger(__name__)

UNTRAINED = ("random", "uniform", "k-means", "farthest-point", "top-norm")
PROBE, ORACLE, EVERY, BLIND = "linear probe", "oracle", "all patches", "no slide"
NEAR_WHOLE = "near-whole"
SCORED = (LEARNED, PROBE, "top-norm")
"""Policies that rank every patch, so that their scores have an AUC."""

Row = dict[str, Any]


class Cell(NamedTuple):
    """Slides that a table's row is about."""

    length: str  # N, "all", "natural" or "near-whole"
    share: float | None  # of tumour, as asked; 0: clean slides; None: as it is
    slides: list[TumourSlide]


class TissueStudy:
    """One checkpoint and one fold.

    Raises:
        CheckpointError, EncoderError, SetupError, SlideError: of what is read.
    """

    def __init__(self, settings: TissueStudySettings) -> None:
        tissue_archive(settings.tissue_dir, IDC_PATCHES)  # that it is there is told before a decoder is read
        with loading(settings.checkpoint):
            model = study_model(settings.checkpoint)
            self.renderer = ChatRenderer(AutoTokenizer.from_pretrained(settings.checkpoint))
        self.model = model.to(settings.device).eval()
        if settings.encoder is None and model.config.encoder:
            settings = settings.changed(encoder=model.config.encoder.partition("@")[0])
        self.settings = settings
        self.pool = tissue_pool(settings.split("test"))
        self.near_whole = near_whole_slide(settings.split("test"))
        self.k = self.model.config.num_slide_tokens
        self.learned = self.model.selector(settings.encoder_mismatch)
        with self.near_whole.open() as slide:
            self.learned.select(slide)  # features of another encoder are told before the probe is trained
        train = tissue_pool(settings.split("train"))
        self.probe = fit_probe(train, train.labels, self.k)
        self.selections: list[Row] = []
        self.answers: list[Row] = []

    def cells(self) -> Iterator[Cell]:
        """Clean slides, and slides of each share, for each length; then the near-whole slide.

        Raises:
            SettingsError: the fold has too few patches for a length.
        """
        for length, count in self.settings.lengths():
            if length == NATURAL:
                slides = natural_slides(self.pool, self.k + 1)
                if not slides:
                    raise SettingsError(f"--slides: found no patient with more than {self.k} patches, wanted one")
                order = np.random.default_rng(self.settings.seed).permutation(len(slides))[:count]
                yield Cell(NATURAL, None, [slides[place] for place in np.sort(order)])
                continue
            for share in (0.0, *self.settings.tumour_shares()):
                num_patches = self.pool.most_patches(share) if length == ALL else int(length)
                numbers = range(self.settings.seed * 10_000, self.settings.seed * 10_000 + count)
                yield Cell(length, share, [PooledSlide(self.pool, num_patches, share, number) for number in numbers])
        yield Cell(NEAR_WHOLE, None, [self.near_whole])

    def run(self) -> None:
        """Fills `selections` and `answers`."""
        cells = list(self.cells())  # a length that cannot be had is told before the first answer
        for cell in cells:
            began = time.monotonic()
            for slide in cell.slides:
                self._judge(cell, slide)
            share = "" if cell.share is None else f", share {cell.share:g}"
            seconds = time.monotonic() - began
            logger.info("N %s%s: %d slides in %.0f s", cell.length, share, len(cell.slides), seconds)

    def policies(self, slide: TumourSlide) -> dict[str, Selector]:
        """All policies for one slide; "all patches" where it is short enough."""
        found: dict[str, Selector] = {LEARNED: self.learned}
        found |= {name: make_policy(name, self.k, self.settings.seed) for name in UNTRAINED}
        found[PROBE] = self.probe
        found[ORACLE] = oracle(slide, self.k)
        if slide.num_patches <= self.settings.most_shown:
            found[EVERY] = UniformPolicy(slide.num_patches)
        return found

    def _judge(self, cell: Cell, slide: TumourSlide) -> None:
        policies = self.policies(slide)
        with slide.open() as opened:
            chosen = {
                name: policy.select(opened, slide.num_patches if name == EVERY else self.k)
                for name, policy in policies.items()
            }
        key, seed = slide.key_patches, self.settings.seed
        where = {
            "fold": self.settings.fold,
            "seed": seed,
            "length": cell.length,
            "share": "" if cell.share is None else cell.share,
            "slide": slide.name,
            "num_patches": slide.num_patches,
            "num_tumour": len(key),
            "num_repeated": slide.num_repeated,
        }
        self.selections += [
            where | {"policy": name} | kept_of(selection, key, self.k)
            for name, selection in chosen.items()
            if name != EVERY
        ]
        asked, names = [], []
        for number, kind in enumerate(self.settings.kinds):
            lots = np.random.default_rng([seed, number, *slide.name.encode()])
            question = ask(kind, slide.share, lots, self.settings.unseen_wording)
            item = tissue_item(slide.name, slide, question)
            for name, selection in [*chosen.items(), (BLIND, None)]:
                asked.append(Asked(item, question, selection))
                names.append(name)
        written = write_answers(self.model, self.renderer, asked, self.settings.max_new_tokens)
        for name, one, answer in zip(names, asked, written, strict=True):
            self.answers.append(where | {"policy": name} | scored(one.question, answer))

    def score_rows(self) -> list[Row]:
        """AUC and precision at K of whatever ranks patches: over all patches of the fold's patients, and the slide."""
        rows = []
        whole = PooledSlide(self.pool, len(self.pool.rows), len(self.pool.tumour) / len(self.pool.rows), 0)
        for name, slide in (("patches of the fold", whole), (NEAR_WHOLE, self.near_whole)):
            is_tumour = slide.labels().astype(bool)
            with slide.open() as opened:
                for policy in SCORED:
                    scores = self.scores(policy, opened)
                    best = np.lexsort((np.arange(len(scores)), -scores))[: self.k]
                    rows.append(
                        {"fold": self.settings.fold, "seed": self.settings.seed, "patches": name, "policy": policy}
                        | {"num_patches": len(scores), "num_tumour": int(is_tumour.sum())}
                        | {"auc": rounded(auc(scores, is_tumour))}
                        | {"k": self.k, "precision": rounded(is_tumour[best].mean())}
                    )
        return rows

    def scores(self, policy: str, slide: FeatureFile) -> np.ndarray:
        """fp32 [N] of one of `SCORED`; what is not finite ranks last."""
        if policy == LEARNED:
            found = self.learned.select(slide, keep_all_scores=True).all_scores
            assert found is not None
        else:
            x = torch.from_numpy(slide.read_rows(0, slide.num_patches)).float()
            found = self.probe.score(x) if policy == PROBE else x.norm(dim=1)
        return torch.where(found.isfinite(), found, -torch.inf).numpy()


def oracle(slide: TumourSlide, k: int) -> OraclePolicy:
    """Tumour first, as many as there are, then others by lot: as many tokens as every other policy keeps."""
    key = slide.key_patches
    rng = np.random.default_rng(list(slide.name.encode()))
    others = np.setdiff1d(np.arange(slide.num_patches), key)
    return OraclePolicy(k, [*rng.permutation(key).tolist(), *rng.permutation(others)[:k].tolist()])


def kept_of(selection: Selection, key: np.ndarray, k: int) -> Row:
    """How much of the tumour a selection kept. Recall is of what k patches could keep; "" on a clean slide."""
    kept = selection.indices.numpy()
    tumour = int(np.isin(kept, key).sum())
    return {
        "kept": len(kept),
        "kept_tumour": tumour,
        "recall": rounded(key_patch_recall(kept, key, k)) if len(key) else "",
        "precision": rounded(tumour / len(kept)),
    }
