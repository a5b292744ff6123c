"""Slides about which many questions can be asked: each shows one finding of each of eight topics, or of seven. A
question asks about one topic.

No set of K patches that is chosen without the question holds the key patches of the topic that is asked about for sure:
there are 32 kinds of findings on slides of several thousand patches, and a finding may have as few as four patches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SettingsError
from vllm_wsi.questions.items import SLIDE_MARK, SlideItem
from vllm_wsi.slides import FeatureFile, features_in_memory

from .generated import length_of, made_world
from .generator import NONE, SPLITS
from .patch_types import type_centres

TOPICS: dict[str, tuple[str, str, str, str]] = {
    "tumour": ("lymphoma", "melanoma", "sarcoma", "carcinoma"),
    "stroma": ("fibrous", "myxoid", "hyaline", "desmoplastic"),
    "vessel": ("artery", "vein", "capillary", "lymphatic"),
    "gland": ("tubular", "cribriform", "papillary", "solid"),
    "nucleus": ("round", "spindle", "giant", "pleomorphic"),
    "infiltrate": ("lymphocytes", "neutrophils", "eosinophils", "macrophages"),
    "necrosis": ("coagulative", "caseous", "fatty", "liquefactive"),
    "margin": ("pushing", "infiltrating", "encapsulated", "ulcerated"),
}
"""Topics, and the findings of each, one of which every slide shows."""
KINDS = [(topic, finding) for topic, findings in TOPICS.items() for finding in findings]
NUM_COMMON = 12
LEAST_PATCHES = 4


@dataclass(frozen=True)
class TopicWorld:
    """What all slides of one benchmark have in common.

    Args:
        seed: of the patch types and of every slide.
        feature_dim: d.
        noise: standard deviation of a patch about its type.
        most_share: of a slide's patches, that one finding has at most; how many it has is drawn log-uniformly from
            four on.
        absent_share: share of slides without any finding of the topic that is asked about; the right answer is "none",
            which is then among the options of every question.

    Raises:
        SettingsError: a value out of range.
    """

    seed: int = 0
    feature_dim: int = 64
    noise: float = 1.0
    most_share: float = 1 / 16
    absent_share: float = 0.0

    def __post_init__(self) -> None:
        if self.feature_dim < 3:
            raise SettingsError(f"topics: feature_dim: found {self.feature_dim}, wanted at least 3")
        if not 0 < self.noise < np.inf:
            raise SettingsError(f"topics: noise: found {self.noise}, wanted a finite number above 0")
        if not 0 <= self.absent_share <= 1:
            raise SettingsError(f"topics: absent_share: found {self.absent_share}, wanted 0 to 1")
        if not 0 < self.most_share * len(TOPICS) <= 1:
            raise SettingsError(f"topics: most_share: found {self.most_share}, wanted above 0, to 1/{len(TOPICS)}")

    @cached_property
    def centres(self) -> NDArray[np.float32]:
        """[common types, then `KINDS`; d], each of mean 0 and variance 1."""
        return type_centres(self.seed, self.feature_dim, NUM_COMMON, len(KINDS), 0).astype(np.float32)

    def slide(self, split: str, number: int, num_patches: int) -> TopicSlide:
        """The same slide for the same arguments; slides of two splits never coincide."""
        return TopicSlide(self, split, number, num_patches)


@dataclass(frozen=True, eq=False)
class TopicSlide:
    """One virtual slide and one question about it: a `SlideSource` whose features are made each time it is opened."""

    world: TopicWorld
    split: str
    number: int
    num_patches: int
    topic: str = field(init=False)  # that is asked about
    finding: str = field(init=False)  # of that topic, or `NONE`
    key_patches: NDArray[np.int64] = field(init=False, repr=False)  # of that finding; ascending, [0] where it is `NONE`
    _types: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = self._rng(0)
        most = max(LEAST_PATCHES, int(self.num_patches * self.world.most_share))
        if self.num_patches < LEAST_PATCHES * len(TOPICS):
            raise SettingsError(
                f"topics: num_patches: found {self.num_patches}, wanted at least {LEAST_PATCHES * len(TOPICS)}"
            )
        types = rng.integers(NUM_COMMON, size=self.num_patches)
        free = rng.permutation(self.num_patches)
        shown = {}
        for topic in TOPICS:
            count = min(most, int(np.exp(rng.uniform(np.log(LEAST_PATCHES), np.log(most + 1)))))
            finding = TOPICS[topic][rng.integers(len(TOPICS[topic]))]
            rows, free = free[:count], free[count:]
            types[rows] = NUM_COMMON + KINDS.index((topic, finding))
            shown[topic] = finding, np.sort(rows)
        topic = list(TOPICS)[rng.integers(len(TOPICS))]
        (finding, key), lots = shown[topic], self._rng(3)
        if lots.random() < self.world.absent_share:
            types[key] = lots.integers(NUM_COMMON, size=len(key))
            finding, key = NONE, key[:0]
        for name, value in (("topic", topic), ("finding", finding), ("key_patches", key)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_types", types)

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.world.seed, SPLITS[self.split], self.number, self.num_patches, purpose, 8])

    @property
    def name(self) -> str:
        return f"topics-{self.world.seed}-{self.split}-{self.number}-{self.num_patches}"

    def features(self) -> NDArray[np.float32]:
        """fp32 [N, d]."""
        x = self._rng(1).standard_normal((self.num_patches, self.world.feature_dim), np.float32)
        x *= self.world.noise
        x += self.world.centres[self._types]
        return x

    def open(self) -> FeatureFile:
        """The slide as an open feature file in memory."""
        opened = features_in_memory(self.features(), name=self.name)
        opened.metadata = {
            "slide_id": self.name,
            "encoder": f"topics@{self.world.seed} (virtual patches, no tissue)",
        }
        return opened

    def item(self) -> SlideItem:
        """The question about the slide. Its options are the names of the topic's findings, which the text does not say:
        a small decoder learns to name a finding in a third of the steps that it needs to find its letter in a list.
        """
        turn = f"{SLIDE_MARK}\nWhich {self.topic} is on this slide?", self.finding
        names = [*TOPICS[self.topic], *([NONE] if self.world.absent_share else [])]
        return SlideItem(self.name, (self,), (turn,), {name: name for name in names})


def topic_items(
    split: str = "train", count: int = 1000, num_patches: int | tuple[int, int] = 512, first: int = 0, **world: Any
) -> list[SlideItem]:
    """One question about each of `count` slides.

    Args:
        split: a key of `SPLITS`.
        num_patches: N of every slide, or the least and the largest N, between which lengths are drawn.
        first: number of the first slide.
        world: arguments of `TopicWorld`.

    Raises:
        SettingsError: an argument that it does not have.
    """
    made = made_world(TopicWorld, "topics", world)
    numbers = range(first, first + count)
    return [made.slide(split, number, length_of(number, num_patches)).item() for number in numbers]
