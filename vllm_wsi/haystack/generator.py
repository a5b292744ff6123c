"""Haystack: virtual slides with known answers, from a seed. A few key patches decide a multiple-choice question.

A slide is a grid of patches. Its regions hold common patch types. Small foci hold the key patches of one of four
findings, and only the key patches tell which answer is right. Distractors mislead a selection policy that does not
know the question: loud distractors have a large norm, dense distractors are nearly equal to one another. Every patch
type has a centre of unit variance. The centre of each rare type resembles that of a common type (cosine 0.5), so that
no single feature tells them apart. A world has knobs that make its slides harder (`HaystackWorld`); they leave the
slide's other patches as they are.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SettingsError
from vllm_wsi.questions.items import SLIDE_MARK, SlideItem, multiple_choice
from vllm_wsi.slides import FeatureFile, features_in_memory, write_features

from .generated import length_of, made_world
from .patch_types import rotation, type_centres

FINDINGS = ("lymphoma", "melanoma", "sarcoma", "carcinoma")
NONE = "none"  # the right answer about a slide without a finding
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
KNOBS = 1 << 20  # purpose of the random numbers behind further findings and empty slides, beyond those of questions


@dataclass(frozen=True)
class HaystackWorld:
    """What all slides of one benchmark have in common.

    Args:
        seed: of the patch types and of every slide.
        feature_dim: d.
        noise: standard deviation of a patch about its type.
        num_common: number of common patch types, beside the four findings.
        num_distractors: number of distractor patch types, which are rare and are no finding.
        distractor_rate: share of a slide's patches that are distractors.
        key_patches: least and most key patches of each finding, whatever the slide's length.
        lookalike_rate: share of a slide's patches that resemble a finding (cosine 0.87 with its type) but are no key
            patches.
        open_share: share of questions that name no options and are answered by the name of the finding, or of all
            findings in the order of `FINDINGS`.
        num_findings: least and most findings of a slide, 1 to 3. A question of choice asks about one of them and offers
            none of the others.
        empty_share: share of slides without a finding. Where it is above 0, "none" is among the options of a question
            of choice: always about an empty slide, and as often as `none_share` says about another.
        none_share: 1 for a test, where "none" must tell nothing; less to train on questions of fewer options too.
        shift_degrees: every patch type's centre is turned by this angle, all by the same rotation, so that the types
            lie to one another as before. At 90 a centre is orthogonal to what it was: a scorer knows nothing of it.

    Raises:
        SettingsError: a value out of range.
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
    num_findings: tuple[int, int] = (1, 1)
    empty_share: float = 0.0
    none_share: float = 1.0
    shift_degrees: float = 0.0

    def __post_init__(self) -> None:
        for name in ("distractor_rate", "lookalike_rate", "open_share", "empty_share", "none_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"haystack: {name}: found {getattr(self, name)}, wanted 0 to 1")
        if self.feature_dim < 3:  # a centre of mean 0 that is half like another needs two directions of its own
            raise SettingsError(f"haystack: feature_dim: found {self.feature_dim}, wanted at least 3")
        if not 0 < self.noise < np.inf:
            raise SettingsError(f"haystack: noise: found {self.noise}, wanted a finite number above 0")
        if not np.isfinite(self.shift_degrees):
            raise SettingsError(f"haystack: shift_degrees: found {self.shift_degrees}, wanted a finite number")
        for name, most in (("key_patches", np.inf), ("num_findings", len(FINDINGS) - 1)):
            low, high = getattr(self, name)
            if not 1 <= low <= high <= most:
                wanted = "1 <= least <= most" + ("" if most == np.inf else f" <= {most}")
                raise SettingsError(f"haystack: {name}: found {low}, {high}, wanted {wanted}")

    @cached_property
    def centres(self) -> NDArray[np.float32]:
        """[common + findings + distractors + look-alikes of each finding, d], each of mean 0 and variance 1."""
        num_rare = len(FINDINGS) + self.num_distractors
        centres = type_centres(self.seed, self.feature_dim, self.num_common, num_rare, len(FINDINGS))
        if self.shift_degrees:
            centres = centres @ rotation(self.seed, self.feature_dim, self.shift_degrees).T
        return centres.astype(np.float32)

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
    finding: int | None = field(init=False)  # that is asked about, as its place in FINDINGS; None: there is none
    findings: tuple[int, ...] = field(init=False)  # all on the slide, ascending
    key_patches: NDArray[np.int64] = field(init=False, repr=False)  # of the finding that is asked about; ascending
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
        of_finding = self._place_findings(rng, finding)
        for one, patches in of_finding.items():
            types[patches] = self.world.num_common + one
        asked = finding if of_finding else None
        key = of_finding.get(finding, np.empty(0, np.int64))
        found = (("finding", asked), ("findings", tuple(sorted(of_finding))), ("key_patches", key), ("_types", types))
        for name, value in found:
            object.__setattr__(self, name, value)

    def _place_findings(self, rng: np.random.Generator, finding: int) -> dict[int, NDArray[np.int64]]:
        """Finding -> rows of its patches, `finding` first; no row twice. A finding that finds no free row is left out,
        and an empty slide has none."""
        world, more = self.world, self._rng(KNOBS)
        of_finding = {finding: self._foci(rng, min(self.num_patches, _draw(rng, world.key_patches)))}
        if more.random() < world.empty_share:
            return {}
        others = [int(one) for one in more.permutation(len(FINDINGS)) if one != finding]
        for other in others[: _draw(more, world.num_findings) - 1]:
            taken = {int(row) for rows in of_finding.values() for row in rows}
            if count := min(self.num_patches - len(taken), _draw(more, world.key_patches)):
                of_finding[other] = self._foci(more, count, taken)
        return of_finding

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.world.seed, SPLITS[self.split], self.number, self.num_patches, purpose])

    def _foci(self, rng: np.random.Generator, count: int, taken: Collection[int] = frozenset()) -> NDArray[np.int64]:
        """Rows of a finding's patches, none of them taken: one to three foci in different places of the tissue."""
        centres = rng.integers(self.num_patches, size=rng.integers(1, 4))
        found: set[int] = set()
        while len(found) < count:
            centre = int(centres[rng.integers(len(centres))])
            dx, dy = np.rint(rng.standard_normal(2) * 2).astype(int)
            row = (centre + int(dy) * self.width + int(dx)) % self.num_patches
            if row not in taken:
                found.add(row)
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
        """The right answer to a question of choice in words."""
        return NONE if self.finding is None else FINDINGS[self.finding]

    def item(self, number: int = 0) -> SlideItem:
        """A question about the slide. The options stand in a random order, so that each letter is as likely.

        Args:
            number: of the question.
        """
        rng = self._rng(2 + number)
        order = rng.permutation(len(FINDINGS))
        options = [FINDINGS[i] for i in order if i == self.finding or i not in self.findings]
        stem = STEMS[rng.integers(len(STEMS))]
        if rng.random() < self.world.open_share:
            answer = ", ".join(FINDINGS[one] for one in self.findings) or NONE
            return SlideItem(self.name, (self,), ((f"{SLIDE_MARK}\n{stem}", answer),))
        if self.world.empty_share and (self.finding is None or rng.random() < self.world.none_share):
            if len(options) == len(LETTERS):
                options.remove(rng.choice([one for one in options if one != self.finding_name]))
            options.insert(rng.integers(len(options) + 1), NONE)
        letter = LETTERS[options.index(self.finding_name)]
        return multiple_choice(self.name, self, stem, dict(zip(LETTERS, options, strict=False)), letter)

    def question(self, number: int) -> str:
        """The text of a question, as a client asks it beside the slide."""
        return self.item(number).question.removeprefix(f"{SLIDE_MARK}\n")

    @staticmethod
    def option(question: str, letter: str) -> str | None:
        """The finding that a letter stands for in a question; None where the question has no such letter."""
        lines = [line for line in question.splitlines() if letter and line.startswith(f"{letter}. ")]
        return lines[0].partition(". ")[2] if lines else None


def _draw(rng: np.random.Generator, least_and_most: tuple[int, int]) -> int:
    return int(rng.integers(*least_and_most, endpoint=True))


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
    made = made_world(HaystackWorld, "haystack", world)
    numbers = range(first, first + count)
    return [made.slide(split, number, length_of(number, num_patches)).item() for number in numbers]
