"""Haystack: virtual slides with known answers, from a seed. A few key patches decide a multiple-choice question.

A slide is a grid of patches. Its regions hold common patch types. Small foci hold the key patches of one of four
findings, and only the key patches tell which answer is right. Distractors mislead a selection policy that does not
know the question: loud distractors have a large norm, dense distractors are nearly equal to one another. Every patch
type has a centre of unit variance. The centre of each rare type resembles that of a common type (cosine 0.5), so that
no single feature tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SettingsError
from vllm_wsi.questions.items import SLIDE_MARK, SlideItem, multiple_choice
from vllm_wsi.slides import FeatureFile, features_in_memory, write_features

FINDINGS = ("lymphoma", "melanoma", "sarcoma", "carcinoma")
STEMS = (
    "Which tumour is present on this slide?",
    "What does this slide show?",
    "Which of these findings is on the slide?",
)
LETTERS = "ABCD"
SPLITS = {"train": 0, "validation": 1, "test": 2}
PATCH_PX = 512
REGIONS = 12  # of each slide
LOUDNESS = 2.5  # the features of loud distractors are multiplied by it
DENSE_NOISE = 0.2  # standard deviation of a dense distractor about its type


@dataclass(frozen=True)
class HaystackWorld:
    """What all slides of one benchmark have in common.

    Args:
        seed: of the patch types and of every slide.
        feature_dim: d.
        noise: standard deviation of a patch about its type.
        num_common, num_distractors: numbers of patch types beside the four findings.
        distractor_rate: share of a slide's patches that are distractors.
        key_patches: least and most key patches of a slide, whatever its length.
        lookalike_rate: share of a slide's patches that resemble a finding (cosine 0.87 with its type) but are no key
            patches.
        open_share: share of questions that name no options and are answered by the name of the finding.
    """

    seed: int = 0
    feature_dim: int = 64
    noise: float = 1.0
    num_common: int = 12
    num_distractors: int = 8
    distractor_rate: float = 0.03
    key_patches: tuple[int, int] = (4, 12)
    lookalike_rate: float = 0.0
    open_share: float = 0.0

    @cached_property
    def centres(self) -> NDArray[np.float32]:
        """[common + findings + distractors + look-alikes of each finding, d], each of mean 0 and variance 1."""
        rng = np.random.default_rng([self.seed, 7])
        common = _standardise(rng.standard_normal((self.num_common, self.feature_dim)))
        rare = _standardise(rng.standard_normal((len(FINDINGS) + self.num_distractors, self.feature_dim)))
        like = common[rng.integers(self.num_common, size=len(rare))]
        along = (rare * like).mean(axis=1, keepdims=True)
        across = _standardise(rare - along * like)
        lookalikes = (np.sqrt(0.75) * like + 0.5 * across)[: len(FINDINGS)]
        return np.concatenate((common, 0.5 * like + np.sqrt(0.75) * across, lookalikes)).astype(np.float32)

    @property
    def first_lookalike(self) -> int:
        """Row of `centres` where the look-alikes begin."""
        return self.num_common + len(FINDINGS) + self.num_distractors

    def slide(self, split: str, number: int, num_patches: int) -> HaystackSlide:
        """The same slide for the same arguments; slides of two splits never coincide."""
        return HaystackSlide(self, split, number, num_patches)

    def items(self, split: str, count: int, num_patches: int, first: int = 0) -> list[SlideItem]:
        """One question about each of `count` slides."""
        return [self.slide(split, number, num_patches).item() for number in range(first, first + count)]


@dataclass(frozen=True, eq=False)
class HaystackSlide:
    """One virtual slide: a `SlideSource` whose features are made each time that it is opened."""

    world: HaystackWorld
    split: str
    number: int
    num_patches: int
    finding: int = field(init=False)
    key_patches: NDArray[np.int64] = field(init=False, repr=False)  # ascending
    _types: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = self._rng(0)
        width = self.width
        rows = np.arange(self.num_patches)
        place = np.stack((rows % width, rows // width), axis=1)
        # Every patch belongs to the region whose site is nearest, as tissue forms connected regions.
        sites = rng.uniform(0, width, (REGIONS, 2))
        nearest = np.zeros(len(rows), np.int64)
        closest = np.full(len(rows), np.inf)
        for region, site in enumerate(sites):
            distance = ((place - site) ** 2).sum(axis=1)
            nearest[distance < closest] = region
            closest = np.minimum(closest, distance)
        types = rng.integers(self.world.num_common, size=REGIONS)[nearest]
        finding = int(rng.integers(len(FINDINGS)))
        first_distractor = self.world.num_common + len(FINDINGS)
        distractors = rng.random(len(rows)) < self.world.distractor_rate
        types[distractors] = first_distractor + rng.integers(self.world.num_distractors, size=int(distractors.sum()))
        if self.world.lookalike_rate:
            lookalikes = rng.random(len(rows)) < self.world.lookalike_rate
            types[lookalikes] = self.world.first_lookalike + rng.integers(len(FINDINGS), size=int(lookalikes.sum()))
        key = self._foci(rng, min(self.num_patches, int(rng.integers(*self.world.key_patches, endpoint=True))))
        types[key] = self.world.num_common + finding
        for name, value in (("finding", finding), ("key_patches", key), ("_types", types)):
            object.__setattr__(self, name, value)

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.world.seed, SPLITS[self.split], self.number, self.num_patches, purpose])

    def _foci(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Rows of the key patches: one to three foci in different places of the tissue."""
        centres = rng.integers(self.num_patches, size=rng.integers(1, 4))
        found: set[int] = set()
        while len(found) < count:
            centre = int(centres[rng.integers(len(centres))])
            dx, dy = np.rint(rng.standard_normal(2) * 2).astype(int)
            row = centre + int(dy) * self.width + int(dx)
            found.add(row % self.num_patches)
        return np.array(sorted(found))

    @property
    def width(self) -> int:
        """Patches side by side."""
        return int(np.ceil(np.sqrt(self.num_patches)))

    @property
    def name(self) -> str:
        return f"haystack-{self.world.seed}-{self.split}-{self.number}-{self.num_patches}"

    def features(self) -> NDArray[np.float32]:
        """fp32 [N, d]."""
        world, rng = self.world, self._rng(1)
        x = rng.standard_normal((self.num_patches, world.feature_dim), np.float32)
        x *= world.noise
        distractor = (self._types >= world.num_common + len(FINDINGS)) & (self._types < world.first_lookalike)
        dense = distractor & (self._types % 2 == 0)
        loud = distractor & (self._types % 2 == 1)
        x[dense] *= DENSE_NOISE / world.noise
        x += world.centres[self._types]
        x[loud] *= LOUDNESS
        return x

    def coords_px(self) -> NDArray[np.int64]:
        """[N, 2], level-0 pixels of the top-left corners."""
        rows = np.arange(self.num_patches)
        return np.stack((rows % self.width, rows // self.width), axis=1) * PATCH_PX

    def metadata(self) -> dict[str, str]:
        """What the slide's feature file says about it."""
        side = str(self.width * PATCH_PX)
        return {
            "slide_id": self.name,
            "encoder": f"haystack@{self.world.seed} (virtual patches, no tissue)",
            "patch_size_level0": str(PATCH_PX),
            "width": side,
            "height": side,
        }

    def open(self) -> FeatureFile:
        """The slide as an open feature file in memory."""
        opened = features_in_memory(self.features(), name=self.name)
        opened.metadata = self.metadata()
        return opened

    def write(self, path: Path) -> Path:
        """Writes the slide as a feature file with coordinates; returns its path."""
        write_features(path, self.features().astype(np.float16), self.coords_px(), self.metadata())
        return path

    @property
    def finding_name(self) -> str:
        """The right answer in words."""
        return FINDINGS[self.finding]

    def item(self, number: int = 0) -> SlideItem:
        """A question about the slide. The four findings stand in a random order, so that each letter is as likely.

        Args:
            number: of the question.
        """
        rng = self._rng(2 + number)
        order = rng.permutation(len(FINDINGS))
        options = [FINDINGS[i] for i in order]
        letter = LETTERS[int(np.nonzero(order == self.finding)[0][0])]
        stem = STEMS[rng.integers(len(STEMS))]
        if rng.random() < self.world.open_share:
            return SlideItem(self.name, (self,), ((f"{SLIDE_MARK}\n{stem}", self.finding_name),))
        return multiple_choice(self.name, self, stem, dict(zip(LETTERS, options, strict=True)), letter)

    def question(self, number: int) -> str:
        """The text of a question, as a client asks it beside the slide."""
        return self.item(number).question.removeprefix(f"{SLIDE_MARK}\n")

    @staticmethod
    def option(question: str, letter: str) -> str | None:
        """The finding that a letter stands for in a question; None where the question has no such letter."""
        lines = [line for line in question.splitlines() if letter and line.startswith(f"{letter}. ")]
        return lines[0].partition(". ")[2] if lines else None


def _standardise(rows: NDArray) -> NDArray:
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / rows.std(axis=1, keepdims=True)


def haystack_items(
    split: str = "train", count: int = 1000, num_patches: int | tuple[int, int] = 512, first: int = 0, **world: Any
) -> list[SlideItem]:
    """One question about each of `count` slides.

    Args:
        split: a key of `SPLITS`.
        num_patches: N of every slide, or the least and the largest N, between which lengths are drawn.
        first: number of the first slide.
        world: arguments of `HaystackWorld`.

    Raises:
        SettingsError: an argument that it does not have.
    """
    known = [one.name for one in fields(HaystackWorld)]
    if unknown := world.keys() - {*known}:
        raise SettingsError(f"haystack: found {', '.join(sorted(unknown))}, wanted some of {', '.join(known)}")
    if isinstance(num_patches, int):
        return HaystackWorld(**world).items(split, count, num_patches, first)
    made = HaystackWorld(**world)
    numbers = range(first, first + count)
    lengths = [int(np.random.default_rng([number, 11]).integers(*num_patches, endpoint=True)) for number in numbers]
    return [made.slide(split, number, length).item() for number, length in zip(numbers, lengths, strict=True)]
