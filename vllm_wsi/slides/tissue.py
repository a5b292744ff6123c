"""Where the tissue is, and the patches that lie on it: lazyslide's segmentation and tiling."""

from __future__ import annotations

import logging
import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from openslide import (
    PROPERTY_NAME_BOUNDS_HEIGHT,
    PROPERTY_NAME_BOUNDS_WIDTH,
    PROPERTY_NAME_BOUNDS_X,
    PROPERTY_NAME_BOUNDS_Y,
    AbstractSlide,
)
from wsidata import WSIData
from wsidata.reader import ReaderBase, SlideProperties

from .features import SlideError
from .image import read_scaled

TissueMethod = Literal["otsu", "entropy", "none"]
OVERVIEW_MPP = 4.0  # of the picture in which tissue is looked for, lazyslide's own choice
OVERVIEW_SIDE = 8192  # its longest side, in its own pixels
PATCH_IN_OVERVIEW = 8  # pixels that a patch takes there at least


class _Overview(ReaderBase):
    """A slide as lazyslide reads it: level 0 for geometry, and one overview level, read in bounded memory.

    lazyslide's own choice of a level depends on the memory that is free, and of a slide without a pyramid it reads
    all of level 0.
    """

    name = "vllm-wsi"

    def __init__(self, image: AbstractSlide, name: str, mpp: float, patch_px: int) -> None:
        self.file, self._image = name, image
        width, height = image.dimensions
        scale = max(1.0, min(OVERVIEW_MPP / mpp, patch_px / PATCH_IN_OVERVIEW), max(width, height) / OVERVIEW_SIDE)
        self.overview = max(1, round(width / scale)), max(1, round(height / scale))
        self.set_properties(
            SlideProperties(
                shape=[height, width],
                n_level=2,
                level_shape=[[height, width], [self.overview[1], self.overview[0]]],
                level_downsample=[1.0, scale],
                mpp=mpp,
                bounds=_bounds(image),
            )
        )

    def get_region(self, x: float, y: float, width: int, height: int, level: int = 0, **_: Any) -> NDArray[np.uint8]:
        scale = self.properties.level_downsample[level]
        return read_scaled(self._image, self.file, x, y, width * scale, height * scale, (int(width), int(height)))

    def get_thumbnail(self, size: Any, **_: Any) -> None:
        return None

    def create_reader(self) -> None:
        self.set_reader(self._image)

    def detach_reader(self) -> None:
        """The image is the caller's."""


def _bounds(image: AbstractSlide) -> list[int]:
    """x, y, width, height of what was scanned, in level-0 pixels."""
    keys = PROPERTY_NAME_BOUNDS_X, PROPERTY_NAME_BOUNDS_Y, PROPERTY_NAME_BOUNDS_WIDTH, PROPERTY_NAME_BOUNDS_HEIGHT
    found = [image.properties.get(key) for key in keys]
    if any(value is None for value in found):
        return [0, 0, *image.dimensions]
    return [int(value) for value in found if value is not None]


def tissue_patches(
    image: AbstractSlide, name: str, mpp: float, patch_px: int, method: TissueMethod = "otsu", background: float = 0.3
) -> NDArray[np.int32]:
    """Top-left corners [N, 2] of the patches on tissue, in level-0 pixels, row by row.

    Args:
        mpp: microns per level-0 pixel.
        patch_px: edge of a patch in level-0 pixels.
        method: how tissue is told from glass; "none" takes the whole slide.
        background: the largest share of a patch that may lie beside the tissue.

    Raises:
        SlideError: no tissue, or no patch fits on it.
    """
    width, height = image.dimensions
    if min(width, height) < patch_px:
        raise SlideError(
            f"{name}: found {width} x {height} pixels, wanted at least one patch of {patch_px} x {patch_px}"
        )
    import lazyslide

    slide = WSIData(reader=_Overview(image, name, mpp, patch_px))
    # «No tissue» and «no tiles» are warnings there and errors here.
    logging.getLogger("lazyslide").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method != "none" and lazyslide.pp.find_tissues(slide, level=1, method=method) is False:
            raise SlideError(f"{name}: found no tissue ({method}), wanted some; --tissue none takes the whole slide")
        found = lazyslide.pp.tile_tissues(
            slide,
            patch_px,
            background_fraction=background,
            tissue_key=None if method == "none" else "tissues",
            key_added=None,
            return_tiles=True,
        )
    tiles = None if found is None else found[0]
    corners = np.empty((0, 2)) if tiles is None else tiles.geometry.bounds[["minx", "miny"]].to_numpy()
    inside = (corners >= 0).all(axis=1) & (corners + patch_px <= [width, height]).all(axis=1)
    patches = np.unique(corners[inside].astype(np.int32)[:, ::-1], axis=0)[:, ::-1]  # two tissues may share a place
    if not len(patches):
        raise SlideError(
            f"{name}: found tissue, but no patch of {patch_px} level-0 pixels of which "
            f"{1 - background:.0%} lie on it, wanted at least one"
        )
    return np.ascontiguousarray(patches)
