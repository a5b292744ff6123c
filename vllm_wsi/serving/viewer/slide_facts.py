"""What the viewer tells of a slide before any selection: its image, its size, and where its patches lie."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_wsi.errors import SlideError
from vllm_wsi.selection.selection import NOTHING_SAID
from vllm_wsi.slides import FeatureFile
from vllm_wsi.slides.places import guesses, patch_size, settle, with_image_mpp
from vllm_wsi.slides.regions import Level0Rects, check_image, extent, level0_rects

if TYPE_CHECKING:
    from openslide import AbstractSlide


class ImageFacts(NamedTuple):
    """A slide image that can be read."""

    path: Path
    digest: str  # of its identity
    size_px: tuple[int, int]
    mpp: float | None
    bounds: Mapping[str, str]  # openslide.bounds-*
    tiles: dict[str, Any]


class Found(NamedTuple):
    """The slide image of a URL, or why there is none."""

    image: ImageFacts | None = None
    missing: str | None = None  # one sentence


class Placed(NamedTuple):
    """Where a slide's patches lie, as far as that can be told before a selection."""

    size_px: tuple[float, float] | None  # of the slide at level 0
    guesses: list[str]  # what is only guessed, in words


def place_patches(slide: FeatureFile, name: str, image: ImageFacts | None, remarks: list[str]) -> Placed:
    """Adds to `remarks` what does not fit; the slide is shown all the same."""
    size_px: tuple[float, float] | None = None if image is None else image.size_px
    rects: Level0Rects | None = None
    guessed: list[str] = []
    try:
        coords, size = slide.read_coords(), None
        if coords is not None:
            size = patch_size(slide.metadata, coords, slide.unit, name)
            guessed = guesses(*settle(name, slide.unit, size, NOTHING_SAID))
        if image is None:
            rects = level0_rects(name, coords, slide.coord_unit, size, slide.metadata)
            size_px = finite_size(name, extent(rects, slide.metadata))
        else:
            said = with_image_mpp(NOTHING_SAID, slide.metadata, lambda: image.mpp)
            with suppress(SlideError):  # the selection tells why its patches cannot be placed
                rects = level0_rects(name, coords, slide.coord_unit, size, slide.metadata, said.mpp)
    except SlideError as error:
        remarks.append(str(error))
    if image is not None:
        try:
            check_image(image.path.name, image.size_px, name, slide.metadata, rects)
        except SlideError as error:
            remarks.append(str(error))
    return Placed(size_px, guessed)


def mpp_of(image: AbstractSlide, name: str) -> float | None:
    """None where the image says none that can be used: it is shown all the same, only microns are not placed by it."""
    from vllm_wsi.encoding.image import image_mpp

    try:
        return image_mpp(image, name)
    except SlideError:
        return None


def finite_size(name: str, size_px: tuple[float, float]) -> tuple[float, float]:
    if not (all(map(math.isfinite, size_px)) and min(size_px) > 0):
        raise SlideError(f"{name}: coords: found a slide of {size_px[0]} x {size_px[1]} px, wanted a finite size")
    return size_px


def digest_of(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
