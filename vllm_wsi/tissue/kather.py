"""Slides of eight tissue classes: 5,000 tiles of colorectal cancer as 84 texture features, and questions that name a
tissue (Kather et al., Scientific Reports 2016; the set is doi 10.5281/zenodo.53169, CC BY 4.0).

One slide is left out of training, with all its tiles. The features have other scales than one another, so each is
brought to mean 0 and variance 1 over the tiles that training sees.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vllm_wsi.errors import SettingsError, SlideError
from vllm_wsi.questions.items import SLIDE_MARK, SlideItem, choice_text
from vllm_wsi.settings import Settings

from .pooled_slides import Drawn, PatchPool, TissueSlide
from .tissue_patches import tissue_archive
from .tissue_questions import LETTERS, TissueQuestion

KATHER = "kather2016_features_84d.npz"
TILE_PX, TILE_MPP = 150, 0.495
LEAST_TILES = 4
"""Tiles of a class on a slide that has the class, at least."""

TISSUES = {
    "TUMOR": "tumour epithelium",
    "STROMA": "simple stroma",
    "COMPLEX": "complex stroma",
    "LYMPHO": "lymphocytes",
    "DEBRIS": "debris",
    "MUCOSA": "normal mucosa",
    "ADIPOSE": "adipose tissue",
    "EMPTY": "empty background",
}
"""The set's classes, and their names in questions."""

# The last wording is asked only where unseen wordings are wanted.
PRESENCE_STEMS = (
    "Does this slide show {}? Answer yes or no.",
    "Can {} be found on this slide? Answer yes or no.",
    "Yes or no: does this slide have {}?",
    "Answer yes or no. Does this tissue hold {}?",
)
CHOICE_STEMS = (
    "Which of these tissues is on this slide?",
    "Which tissue does this slide show?",
    "Choose the tissue that is here.",
)

Side = Literal["train", "test"]


@dataclass(frozen=True)
class KatherItem(SlideItem):
    """A conversation about one slide, of one question that names a tissue."""

    asked: TissueQuestion = field(kw_only=True)
    tissue: int = field(kw_only=True)  # the class that the right answer hangs on
    key_patches: NDArray[np.int64] = field(kw_only=True, repr=False)  # rows of the slide of that class, ascending


class KatherSlide(TissueSlide):
    """N tiles of some of the classes, at random places of a square grid.

    Args:
        number: of the slide; with the pool and N the seed of its lots.

    Raises:
        SettingsError: the pool has fewer tiles.
    """

    def __init__(self, pool: PatchPool, num_patches: int, number: int) -> None:
        if not LEAST_TILES <= num_patches <= len(pool.rows):
            raise SettingsError(
                f"num_patches: found {num_patches}, wanted {LEAST_TILES} to {len(pool.rows)}, the tiles of {pool.name}"
            )
        super().__init__(pool, f"{pool.name}-{num_patches}-{number}", num_patches)

    @cached_property
    def tissues(self) -> NDArray[np.int64]:
        """[N] the place in `TISSUES` of each tile."""
        return self.labels()

    def draw(self) -> Drawn:
        """As many classes as lots say, in shares by a flat Dirichlet lot; as few others as N needs."""
        rng = self.lots()
        there = [rows for label in range(len(TISSUES)) if len(rows := self.pool.of_label(label)) >= LEAST_TILES]
        order = rng.permutation(len(there))
        most = min(len(there), self.num_patches // LEAST_TILES)
        wanted = int(rng.integers(1, most, endpoint=True))
        while sum(len(there[place]) for place in order[:wanted]) < self.num_patches and wanted < most:
            wanted += 1
        chosen = [rng.permutation(there[place]) for place in order[:wanted]]
        limits = np.array([len(rows) for rows in chosen])
        counts = np.minimum(LEAST_TILES, limits)
        weights = rng.dirichlet(np.ones(wanted))
        while (missing := self.num_patches - counts.sum()) > 0 and (counts < limits).any():
            free = np.where(counts < limits, weights + 1e-6, 0)
            counts = np.minimum(limits, counts + rng.multinomial(missing, free / free.sum()))
        rows = np.concatenate([rows[:count] for rows, count in zip(chosen, counts, strict=True)])
        if len(rows) < self.num_patches:  # classes with fewer than LEAST_TILES tiles make up the rest
            rest = np.setdiff1d(self.pool.rows, rows)
            rows = np.concatenate((rows, rng.permutation(rest)[: self.num_patches - len(rows)]))
        rows = rng.permutation(rows)
        return Drawn(rows, np.zeros(len(rows), np.int64), self.grid_px())

    def item(self, tissue: int, unseen_wording: bool = False) -> KatherItem:
        """Whether there is a tissue on the slide.

        Args:
            tissue: place in `TISSUES`.
        """
        labels, name = self.tissues, list(TISSUES.values())[tissue]
        rng = np.random.default_rng([tissue, int(self.lots().integers(2**32))])
        stem = _stem(PRESENCE_STEMS, rng, unseen_wording).format(name)
        gold = "A" if (labels == tissue).any() else "B"
        asked = TissueQuestion("tissue_presence", stem, {"A": "yes", "B": "no"}, {"A": "Yes.", "B": "No."}, gold)
        return self._item(asked, tissue, labels)

    def choice(self, unseen_wording: bool = False) -> KatherItem | None:
        """Which of four tissues is on the slide, where just one of them is; None where too few are absent."""
        labels = self.tissues
        rng = np.random.default_rng([len(TISSUES), int(self.lots().integers(2**32))])
        present = np.unique(labels)
        absent = np.setdiff1d(np.arange(len(TISSUES)), present)
        if len(absent) < len(LETTERS) - 1:
            return None
        right = int(rng.choice(present))
        offered = rng.permutation([right, *rng.choice(absent, len(LETTERS) - 1, replace=False)])
        names = list(TISSUES.values())
        options = {letter: names[place] for letter, place in zip(LETTERS, offered, strict=True)}
        gold = LETTERS[int(np.flatnonzero(offered == right)[0])]
        text = choice_text(_stem(CHOICE_STEMS, rng, unseen_wording), options)
        asked = TissueQuestion("tissue_choice", text, options, {letter: letter for letter in options}, gold)
        return self._item(asked, right, labels)

    def _item(self, asked: TissueQuestion, tissue: int, labels: NDArray[np.int64]) -> KatherItem:
        return KatherItem(
            self.name,
            (self,),
            ((f"{SLIDE_MARK}\n{asked.text}", asked.answer),),
            asked.texts,
            asked=asked,
            tissue=tissue,
            key_patches=np.flatnonzero(labels == tissue),
        )


def _stem(stems: tuple[str, ...], rng: np.random.Generator, unseen_wording: bool) -> str:
    return stems[-1] if unseen_wording else stems[rng.integers(len(stems) - 1)]


def kather_encoder(leave_out: str) -> str:
    """What the features are named after, since their scale is that of the slides that training sees."""
    return f"kather2016-texture@84-without-{leave_out}"


def kather_pool(folder: str | Path, leave_out: str, side: Side = "train") -> PatchPool:
    """The tiles of one slide (`test`), or of all others (`train`), standardised by those of the others.

    Raises:
        SetupError: the file is not there.
        SlideError: it is another file.
        SettingsError: there is no such slide or side.
    """
    path = tissue_archive(folder, KATHER)
    try:
        with np.load(path, allow_pickle=False) as file:
            x, y, classes, slides = (file[name] for name in ("X", "y", "classes", "slide"))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise SlideError(f"{path}: found no readable X, y, classes and slide ({error}), wanted them") from error
    if classes.tolist() != list(TISSUES) or len({len(x), len(y), len(slides)}) > 1 or x.ndim != 2:
        raise SlideError(f"{path}: found classes {classes.tolist()}, wanted {', '.join(TISSUES)} and one row a tile")
    names = np.unique(slides).tolist()
    if leave_out not in names:
        raise SettingsError(f"leave_out: found {leave_out!r}, wanted one of {', '.join(names)}")
    if side not in ("train", "test"):
        raise SettingsError(f"side: found {side!r}, wanted train or test")
    is_out = slides == leave_out
    seen = x[~is_out].astype(np.float64)
    spread = seen.std(axis=0)
    standard = (x - seen.mean(axis=0)) / np.where(spread > 0, spread, 1)
    return PatchPool(
        f"kather-{leave_out}-{side}",
        kather_encoder(leave_out),
        (np.clip(standard, -1e4, 1e4).astype(np.float16),),
        y,
        slides,
        np.zeros((len(x), 2), np.int64),  # places of tiles on their slides are not known
        np.flatnonzero(is_out if side == "test" else ~is_out),
        TILE_PX,
        TILE_MPP,
    )


class KatherRecipe(Settings, frozen=True):
    """`generate: {name: kather, ...}` of a training recipe."""

    data: Path  # the folder that holds the features
    leave_out: str  # slide, "01" to "10"
    side: Side = "train"
    count: int = Field(1000, ge=1)  # of slides
    first: int = Field(0, ge=0)
    num_patches: int = Field(256, ge=LEAST_TILES)
    questions_per_slide: int = Field(8, ge=1, le=9)  # the eight tissues in random order, then one of choice


def kather_items(**recipe: Any) -> list[KatherItem]:
    """Questions about `count` slides; those about one slide stand side by side and share it.

    Args:
        recipe: fields of `KatherRecipe`.

    Raises:
        SettingsError: a field that does not fit.
        SetupError, SlideError: as `kather_pool`.
    """
    settings = KatherRecipe.of(recipe, "generate: kather")
    pool = kather_pool(settings.data, settings.leave_out, settings.side)
    items: list[KatherItem] = []
    for number in range(settings.first, settings.first + settings.count):
        slide = KatherSlide(pool, settings.num_patches, number)
        order = np.random.default_rng([number, 17]).permutation(len(TISSUES))
        items += [slide.item(int(tissue)) for tissue in order[: settings.questions_per_slide]]
        if settings.questions_per_slide > len(TISSUES) and (choice := slide.choice()) is not None:
            items.append(choice)
    return items
