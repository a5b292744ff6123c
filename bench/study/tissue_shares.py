"""Slides pooled from real tiles about which questions of share can be asked (as `share_slides.py` of virtual ones).

The tiles are those of Kather et al. 2016 (docs/tissue.md). Source slides are left out of training, three or four at a
time, so that each fold's tests have some hundred tiles of most classes. One kind of question is asked about each slide:

- prevalence: which of four named tissues covers most of it. The winner leads all others by 3 to 30 % of the slide.
- counting: how much tumour is on it: none, few (1 % of the tiles), some (5 %) or much (20 %), each to a fifth more or
  less.
- finding: which of three tissues is on it: tumour, lymphocytes or debris. It has 4 to 12 tiles of that one.

But for that amount, slides of the three kinds are drawn alike. The source slides of a pool come in a random order on
each pooled slide: a class's tiles are those of the first source slide, then of the next where these are not enough. So
few source slides make up the most of a pooled slide, as far as their tiles go; a tile comes again only where the pool
has no more of its class. Tiles of a class lie in runs of 16 rows, the runs in random order.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.questions.items import SLIDE_MARK, SlideItem
from vllm_wsi.tissue.kather import LEAST_TILES, TISSUES, kather_pool
from vllm_wsi.tissue.pooled_slides import Drawn, PatchPool, TissueSlide

from .share_slides import AMOUNTS, KINDS, STEMS

FOLDS = (("02", "04", "06"), ("01", "03", "08", "10"), ("05", "07", "09"))  # source slides left out together
NAMED = {"stroma": "STROMA", "complex": "COMPLEX", "mucosa": "MUCOSA", "adipose": "ADIPOSE"}
FINDINGS = {"tumour": "TUMOR", "lymphocytes": "LYMPHO", "debris": "DEBRIS"}
OPTIONS = {"prevalence": tuple(NAMED), "counting": tuple(AMOUNTS), "finding": tuple(FINDINGS)}
TEXTS = tuple(f"user\n{STEMS[kind]}\nassistant\n" + "\n".join(OPTIONS[kind]) for kind in KINDS)
FEATURE_DIM, NUM_PATCHES, RUN = 84, 1024, 16
KEY_TILES = (4, 12)
LEAST_LEAD, MOST_LEAD, MOST_SHARE, DRAWS = 0.03, 0.3, 0.5, 1024
EMPTY_WEIGHT = 0.25  # of background among the common classes, in the Dirichlet lot in which each tissue has 1
CLASSES = list(TISSUES)
SEEN, LEFT_OUT = TESTS = ("seen sources", "left-out sources")


class Made(NamedTuple):
    """What was drawn of a slide."""

    rows: NDArray[np.int64]  # [N], of the pool
    answer: str
    source: str  # the source slide that comes first
    lead: float  # of the class that covers most, before the next one
    key_tiles: NDArray[np.int64]  # rows of the slide


def fold_pools(folder: str | Path, left_out: tuple[str, ...]) -> dict[str, PatchPool]:
    """Tiles of three sides: «train», «seen sources» and «left-out sources», in scales that only «train» sets.

    Every fourth tile of each class on each source slide that is not left out is one of «seen sources»: training meets
    its source slide, but not the tile.
    """
    whole = kather_pool(folder, left_out[0])
    side = np.where(np.isin(whole.patients, left_out), LEFT_OUT, "train").astype(object)
    for source in np.setdiff1d(whole.patients, left_out):
        for label in range(len(TISSUES)):
            side[np.flatnonzero((whole.patients == source) & (whole.labels == label))[3::4]] = SEEN
    x, is_train = whole.views[0].astype(np.float64), side == "train"
    spread = x[is_train].std(axis=0)
    x = ((x - x[is_train].mean(axis=0)) / np.where(spread > 0, spread, 1)).astype(np.float16)
    encoder = f"kather2016-texture@84-without-{'-'.join(left_out)}"
    return {
        name: replace(whole, name=f"{encoder}-{name}", encoder=encoder, views=(x,), rows=np.flatnonzero(side == name))
        for name in ("train", *TESTS)
    }


class TissueShareSlide(TissueSlide):
    """One slide and the question about it; the same for the same pool, number and N."""

    def __init__(self, pool: PatchPool, number: int, num_patches: int = NUM_PATCHES) -> None:
        super().__init__(pool, f"{pool.name}-shares-{num_patches}-{number}", num_patches)
        self.number = number

    @property
    def kind(self) -> str:
        return KINDS[self.number % len(KINDS)]

    def draw(self) -> Drawn:
        return Drawn(self.made.rows, np.zeros(self.num_patches, np.int64), self.grid_px())

    @cached_property
    def made(self) -> Made:
        rng, n = self.lots(), self.num_patches
        order = rng.permutation(np.unique(self.pool.patients[self.pool.rows]))
        finding, amount = list(FINDINGS)[rng.integers(len(FINDINGS))], list(AMOUNTS)[rng.integers(len(AMOUNTS))]
        key_tiles = int(rng.integers(*KEY_TILES, endpoint=True))
        count = round(AMOUNTS[amount] * rng.uniform(0.8, 1.2) * n)
        if self.kind == "counting":
            finding = "tumour"
        elif self.kind == "finding" or rng.random() < 0.5:
            count = key_tiles
        winner = list(NAMED)[rng.integers(len(NAMED))]
        shares, lead = self._shares(rng, winner, count / n)
        ends = np.round(np.cumsum([0, *shares.values()]) * (n - count)).astype(np.int64)
        counts = dict(zip(shares, np.diff(ends).tolist(), strict=True)) | {FINDINGS[finding]: count}
        runs = []
        for name, wanted in counts.items():
            tiles = self._tiles(rng, name, order, wanted)
            runs += [tiles[start : start + RUN] for start in range(0, wanted, RUN)]
        rows = np.concatenate([runs[place] for place in rng.permutation(len(runs))])
        key = np.flatnonzero(self.pool.labels[rows] == CLASSES.index(FINDINGS[finding]))
        answer = {"prevalence": winner, "counting": amount, "finding": finding}[self.kind]
        return Made(rows, answer, str(order[0]), lead, key)

    def _shares(self, rng: np.random.Generator, winner: str, found: float) -> tuple[dict[str, float], float]:
        """(of each common class its share of the common tiles, the winner's lead as a share of the slide).

        Args:
            found: the share of the finding's tiles.
        """
        names = [*NAMED.values()]
        if len(self.pool.of_label(CLASSES.index("EMPTY"))) >= LEAST_TILES:
            names.append("EMPTY")
        weights = [EMPTY_WEIGHT if name == "EMPTY" else 1.0 for name in names]
        place = names.index(NAMED[winner])
        while True:
            draws = rng.dirichlet(weights, DRAWS)
            of_slide = draws * (1 - found)
            others = np.maximum(np.delete(of_slide, place, axis=1).max(axis=1), found)
            lead = of_slide[:, place] - others
            fits = np.flatnonzero((lead >= LEAST_LEAD) & (lead <= MOST_LEAD) & (of_slide.max(axis=1) <= MOST_SHARE))
            if len(fits):
                return dict(zip(names, draws[fits[0]].tolist(), strict=True)), float(lead[fits[0]])

    def _tiles(self, rng: np.random.Generator, name: str, order: NDArray[np.str_], count: int) -> NDArray[np.int64]:
        """Tiles of a class from the source slides in that order, all of them again where there are too few."""
        tiles = rng.permutation(self.pool.of_label(CLASSES.index(name)))
        rank = {source: place for place, source in enumerate(order.tolist())}
        ranks = np.array([rank[source] for source in self.pool.patients[tiles].tolist()])
        return np.resize(tiles[np.argsort(ranks, kind="stable")], count)

    def features(self) -> NDArray[np.float32]:
        """fp32 [N, d]."""
        return self.pool.views[0][self.made.rows].astype(np.float32)

    def item(self) -> SlideItem:
        """The question, answered by one word. The slide itself is not in it."""
        options = {name: name for name in OPTIONS[self.kind]}
        return SlideItem(self.name, (), ((f"{SLIDE_MARK}\n{STEMS[self.kind]}", self.made.answer),), options)
