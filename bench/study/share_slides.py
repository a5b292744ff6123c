"""Virtual slides about which questions of share can be asked: what the 32 best patches leave out.

They are made of haystack@0's patch types, so that the demo checkpoint's scorer finds the patches of a finding on them.
Their tissue lies in regions, as on haystack's slides. One kind of question is asked about each slide:

- prevalence: which of four named tissues covers most of it. The winner leads the next by 3 to 8 % of the slide; on
  slides to train on by 3 to 30 %, because a small decoder learns nothing from the narrow ones alone.
- counting: how much tumour is on it: none, few (1 % of the patches), some (5 %) or much (20 %), each to a fifth more
  or less.
- finding: which of four findings is on it. It has 4 to 12 key patches, as on haystack's slides.

But for that amount, slides of the three kinds are drawn alike. The patch types look a little different on each slide,
as tissue does: without that, how far the 32 best patches lie from the others tells how many tumour patches there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.haystack.generator import DENSE_NOISE, FINDINGS, LOUDNESS, SPLITS, HaystackWorld
from vllm_wsi.questions.items import SLIDE_MARK, SlideItem

KINDS = ("prevalence", "counting", "finding")
TISSUES = ("adipose", "muscle", "mucosa", "stroma")  # the world's first common types
AMOUNTS = {"none": 0.0, "few": 0.01, "some": 0.05, "much": 0.2}
OPTIONS = {"prevalence": TISSUES, "counting": tuple(AMOUNTS), "finding": FINDINGS}
STEMS = {
    "prevalence": "Which tissue covers most of this slide?",
    "counting": "How much tumour is on this slide?",
    "finding": "Which finding is on this slide?",
}
TEXTS = tuple(f"user\n{STEMS[kind]}\nassistant\n" + "\n".join(OPTIONS[kind]) for kind in KINDS)
WORLD = HaystackWorld()
REGIONS, DRAWS = 24, 1024
LEAST_LEAD, MOST_LEAD = 0.03, {"train": 0.3, "test": 0.08}  # of the slide, of the tissue that covers most
NAMED_SHARE = 0.15  # the chance of each named tissue to fill a region; the other common types share the rest


@dataclass(frozen=True)
class ShareSlide:
    """One slide and the question about it; the same for the same arguments.

    Args:
        variation: standard deviation of each patch type's centre on a slide about its centre in the world, in each of
            the d directions; the patches of a slide have 1 about theirs.
    """

    split: str
    number: int
    num_patches: int
    variation: float

    @property
    def kind(self) -> str:
        return KINDS[self.number % len(KINDS)]

    @cached_property
    def _drawn(self) -> tuple[NDArray[np.int64], str]:
        """(each patch's type, a row of `WORLD.centres`; the right answer)."""
        rng, n = self._rng(0), self.num_patches
        width = int(np.ceil(np.sqrt(n))) | 1  # odd, so that evenly spaced rows do not stand in one column
        place = np.stack((np.arange(n) % width, np.arange(n) // width), axis=1).astype(np.float32)
        finding, amount = int(rng.integers(len(FINDINGS))), list(AMOUNTS)[rng.integers(len(AMOUNTS))]
        key_patches = int(rng.integers(*WORLD.key_patches, endpoint=True))
        count = round(AMOUNTS[amount] * rng.uniform(0.8, 1.2) * n)
        if self.kind == "finding" or (self.kind == "prevalence" and rng.random() < 0.5):
            count = key_patches
        foci = place[rng.integers(n, size=rng.integers(1, 4))]
        tumour = np.argsort(_nearest(place, foci)[1], kind="stable")[:count]
        distractors = rng.random(n) < WORLD.distractor_rate
        region = _nearest(place, rng.uniform(0, width, (REGIONS, 2)).astype(np.float32))[0]
        common = np.ones(n, bool)
        common[tumour] = common[distractors] = False
        winner = int(rng.integers(len(TISSUES)))
        types = _tissues(rng, np.bincount(region[common], minlength=REGIONS) / n, winner, self.split)[region]
        first = WORLD.num_common + len(FINDINGS)
        types[distractors] = first + rng.integers(WORLD.num_distractors, size=int(distractors.sum()))
        types[tumour] = WORLD.num_common + finding
        return types, {"prevalence": TISSUES[winner], "counting": amount, "finding": FINDINGS[finding]}[self.kind]

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([SPLITS[self.split], self.number, self.num_patches, purpose, 9])

    @property
    def types(self) -> NDArray[np.int64]:
        return self._drawn[0]

    def features(self) -> NDArray[np.float32]:
        """fp32 [N, d], as haystack makes them of the types."""
        types = self.types
        centres = WORLD.centres + self.variation * self._rng(2).standard_normal(WORLD.centres.shape, np.float32)
        x = self._rng(1).standard_normal((self.num_patches, WORLD.feature_dim), np.float32)
        x *= WORLD.noise
        distractor = types >= WORLD.num_common + len(FINDINGS)
        x[distractor & (types % 2 == 0)] *= DENSE_NOISE / WORLD.noise
        x += centres[types]
        x[distractor & (types % 2 == 1)] *= LOUDNESS
        return x

    def item(self) -> SlideItem:
        """The question, answered by one word. The slide itself is not in it."""
        options = {name: name for name in OPTIONS[self.kind]}
        where = f"shares-{self.split}-{self.number}"
        return SlideItem(where, (), ((f"{SLIDE_MARK}\n{STEMS[self.kind]}", self._drawn[1]),), options)


def _nearest(place: NDArray[np.float32], sites: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(the nearest site of each place, the squared distance to it)."""
    distance = ((place[:, None] - sites[None]) ** 2).sum(axis=2)
    return distance.argmin(axis=1), distance.min(axis=1)


def _tissues(rng: np.random.Generator, area: NDArray[np.float64], winner: int, split: str) -> NDArray[np.int64]:
    """A common type for each region, so that the winner leads the other named tissues by as much as the split says.

    Args:
        area: of each region, as a share of the slide.
    """
    chance = np.full(WORLD.num_common, (1 - NAMED_SHARE * len(TISSUES)) / (WORLD.num_common - len(TISSUES)))
    chance[: len(TISSUES)] = NAMED_SHARE
    most = MOST_LEAD[split]
    while True:
        draws = rng.choice(WORLD.num_common, size=(DRAWS, len(area)), p=chance)
        shares = np.stack([((draws == one) * area).sum(axis=1) for one in range(len(TISSUES))], axis=1)
        lead = shares[:, winner] - np.delete(shares, winner, axis=1).max(axis=1)
        # The winner leads the unnamed types too, as the question asks about all of the slide.
        others = np.stack([((draws == one) * area).sum(axis=1) for one in range(len(TISSUES), WORLD.num_common)])
        fits = np.flatnonzero((lead >= LEAST_LEAD) & (lead <= most) & (shares[:, winner] > others.max(axis=0)))
        if len(fits):
            return draws[fits[0]]
