"""A slide as one small picture, in which tissue is looked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from openslide import (
    PROPERTY_NAME_BOUNDS_HEIGHT,
    PROPERTY_NAME_BOUNDS_WIDTH,
    PROPERTY_NAME_BOUNDS_X,
    PROPERTY_NAME_BOUNDS_Y,
    AbstractSlide,
)

from .image import read_scaled

OVERVIEW_MPP = 4.0  # microns of its pixels: a nucleus is one or two of them
OVERVIEW_SIDE = 3072  # its longest side, in its own pixels
PATCH_IN_OVERVIEW = 8  # pixels that a patch takes there at least


@dataclass(frozen=True)
class Overview:
    """What was scanned of a slide, scaled down."""

    rgb: NDArray[np.uint8]  # [h, w, 3]
    scanned: NDArray[np.bool_]  # [h, w]; the reader says of the rest that nothing was scanned there
    x_px: int  # of its top-left corner, in level-0 pixels
    y_px: int
    scale: tuple[float, float]  # level-0 pixels for each of its own, across and down


def read_overview(image: AbstractSlide, name: str, mpp: float, patch_px: int) -> Overview:
    """Reads it in bounded memory, whatever levels the slide has.

    Args:
        mpp: microns per level-0 pixel.
        patch_px: edge of a patch in level-0 pixels.

    Raises:
        SlideError: the file is damaged.
    """
    x, y, width, height = scanned_bounds(image)
    scale = max(1.0, min(OVERVIEW_MPP / mpp, patch_px / PATCH_IN_OVERVIEW), max(width, height) / OVERVIEW_SIDE)
    size = max(1, round(width / scale)), max(1, round(height / scale))
    rgba = read_scaled(image, name, x, y, width, height, size, with_alpha=True)
    rgb = np.ascontiguousarray(rgba[..., :3])
    return Overview(rgb, rgba[..., 3] > 127, x, y, (width / size[0], height / size[1]))


def scanned_bounds(image: AbstractSlide) -> tuple[int, int, int, int]:
    """x, y, width, height of what was scanned, in level-0 pixels: the whole slide, where it says nothing usable."""
    keys = PROPERTY_NAME_BOUNDS_X, PROPERTY_NAME_BOUNDS_Y, PROPERTY_NAME_BOUNDS_WIDTH, PROPERTY_NAME_BOUNDS_HEIGHT
    full_width, full_height = image.dimensions
    try:
        x, y, width, height = (int(image.properties[key]) for key in keys)
    except (KeyError, ValueError):
        return 0, 0, full_width, full_height
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, full_width), min(y + height, full_height)
    if right <= left or bottom <= top:
        return 0, 0, full_width, full_height
    return left, top, right - left, bottom - top
