"""Items for training: questions about slides pooled from the tissue's patches, as a recipe asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache as remember
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from vllm_wsi.encoding.encoders import PatchEncoder, load_encoder
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.settings import Settings

from .folds import Side, part_of_patients, patient_folds, rows_of_side
from .kather import kather_items
from .pooled_slides import PatchPool, PooledSlide, TumourSlide, natural_slides
from .tissue_patches import IDC_PATCHES, IDC_SLIDE, TissuePatches, read_patches
from .tissue_questions import Kind, TissueItem, ask, tissue_item
from .view_features import view_features

ENCODER = "efficientnet-lite0"
TRAINING_VIEWS = 4

Share = Annotated[float, Field(ge=0, le=1)]


class TissueSplit(Settings, frozen=True):
    """Which patches slides are pooled from."""

    data: Path  # the folder that holds idc_patches.zip
    encoder: str = ENCODER
    num_views: int = Field(1, ge=1)  # of each patch; further ones are flipped and restained
    num_folds: int = Field(3, ge=2)
    fold: int = Field(0, ge=0)
    side: Side = "train"
    part: tuple[Share, Share] = (0.0, 1.0)  # of the side's patients, in an order by lot: from here, up to there
    split_seed: int = 0  # of the folds and of the views' stains
    cache: Path | None = None  # of features; None: the package's cache


class TissueRecipe(TissueSplit, frozen=True):
    """`generate: {name: tissue, ...}` of a training recipe."""

    num_views: int = Field(TRAINING_VIEWS, ge=1)
    count: int = Field(1000, ge=1)  # of slides
    first: int = Field(0, ge=0)  # number of the first slide
    num_patches: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 512
    """N of every slide, or the least and the largest N, between which lengths are drawn log-uniformly."""
    shares: list[Share | tuple[Share, Share]] = Field(default=[0.0, (0.01, 0.3)], min_length=1)
    """Of tumour; each slide draws one entry, as likely as any other: a share, or two ends between which its share is
    drawn log-uniformly. 0 is a slide without tumour."""
    natural_rate: float = Field(0.0, ge=0, le=1)  # share of slides that are one patient's patches, of whatever N
    questions: list[Kind] = Field(default=["presence"], min_length=1)
    questions_per_slide: int = Field(1, ge=1)  # of different kinds, in turn
    num_wordings: int | None = Field(None, ge=1)  # of each kind; None: all that are not kept for evaluation

    @model_validator(mode="after")
    def _ranges(self) -> TissueRecipe:
        if isinstance(self.num_patches, tuple) and self.num_patches[0] > self.num_patches[1]:
            raise ValueError(f"num_patches: found {list(self.num_patches)}, wanted the least one first")
        for one in self.shares:
            if isinstance(one, tuple) and not 0 < one[0] <= one[1]:
                raise ValueError(f"shares: found {list(one)}, wanted two shares above 0, the least one first")
        if self.questions_per_slide > len(self.questions):
            raise ValueError(
                f"questions_per_slide: found {self.questions_per_slide}, wanted at most {len(self.questions)}, "
                "one of each kind"
            )
        return self


def tissue_pool(split: TissueSplit, encoder: PatchEncoder | None = None) -> PatchPool:
    """The encoded patches of one side of a fold; what is not in the cache is encoded first.

    Args:
        encoder: instead of the one that the split names.

    Raises:
        SetupError, SlideError, EncoderError: of the archive and of the encoder.
        SettingsError: there is no such fold.
    """
    patches = _read(split.data.resolve(), IDC_PATCHES)
    folds = patient_folds(patches.patients, patches.labels, split.num_folds, split.split_seed)
    rows = part_of_patients(rows_of_side(folds, split.fold, split.side), patches.patients, split.part, split.split_seed)
    part = "" if split.part == (0, 1) else f"-{split.part[0]:g}to{split.part[1]:g}"
    name = f"idc-{split.split_seed}-{split.fold}of{split.num_folds}-{split.side}{part}"
    return _pool(name, patches, split, rows, encoder)


def near_whole_slide(split: TissueSplit, encoder: PatchEncoder | None = None) -> TumourSlide:
    """The slide of a patient who is in no fold, nearly whole, with its true map; arguments as of `tissue_pool`."""
    patches = _read(split.data.resolve(), IDC_SLIDE)
    pool = _pool("idc-slide", patches, split.changed(num_views=1), np.arange(len(patches)), encoder)
    (slide,) = natural_slides(pool)
    return slide


@remember
def _read(folder: Path, name: str) -> TissuePatches:
    return read_patches(folder, name)


def _pool(
    name: str, patches: TissuePatches, split: TissueSplit, rows: np.ndarray, encoder: PatchEncoder | None
) -> PatchPool:
    encoder = encoder or load_encoder(split.encoder)
    views = view_features(patches, encoder, split.num_views, split.cache, split.split_seed)
    return PatchPool(name, encoder.id, views, patches.labels, patches.patients, patches.coords_px, rows)


def tissue_items(**recipe: Any) -> list[TissueItem]:
    """Questions about `count` slides; those about one slide stand side by side and share it.

    Args:
        recipe: fields of `TissueRecipe`.

    Raises:
        SettingsError: a field that does not fit.
        SetupError, SlideError, EncoderError: as `tissue_pool`.
    """
    settings = TissueRecipe.of(recipe, "generate: tissue")
    pool = tissue_pool(settings)
    natural = natural_slides(pool) if settings.natural_rate else []
    items = []
    for number in range(settings.first, settings.first + settings.count):
        rng = np.random.default_rng([settings.split_seed, number, 13])
        slide: TumourSlide
        if natural and rng.random() < settings.natural_rate:
            slide = natural[rng.integers(len(natural))]
        else:
            num_patches, share = _length(settings, rng), _share(settings, rng)
            slide = PooledSlide(pool, num_patches, share, number, any_view=True)
        first = rng.integers(len(settings.questions))
        for turn in range(settings.questions_per_slide):
            kind = settings.questions[(first + turn) % len(settings.questions)]
            asked = ask(kind, slide.share, rng, num_wordings=settings.num_wordings)
            items.append(tissue_item(f"tissue, slide {number}", slide, asked))
    return items


GENERATORS: dict[str, Callable[..., Sequence[SlideItem]]] = {"tissue": tissue_items, "kather": kather_items}
"""Makers of questions that a training recipe calls by name (`generate: {name: tissue, ...}`)."""


def _length(settings: TissueRecipe, rng: np.random.Generator) -> int:
    if isinstance(settings.num_patches, int):
        return settings.num_patches
    return round(_log_uniform(rng, *settings.num_patches))


def _share(settings: TissueRecipe, rng: np.random.Generator) -> float:
    chosen = settings.shares[rng.integers(len(settings.shares))]
    return _log_uniform(rng, *chosen) if isinstance(chosen, tuple) else chosen


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))
