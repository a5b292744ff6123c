"""Where the tissue is, and the patches that lie on it: our mask of what is not glass, and lazyslide's tiling."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
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
from .glass import clean, find_glass, has_dark_ground, tissue_mask
from .image import read_scaled

TissueMethod = Literal["glass", "entropy", "none"]
OVERVIEW_MPP = 4.0  # of the picture in which tissue is looked for
OVERVIEW_SIDE = 4096  # its longest side, in its own pixels
PATCH_IN_OVERVIEW = 8  # pixels that a patch takes there at least
CLOSE_UM = 24.0  # gaps of up to twice that belong to the tissue around them
LEAST_OF_PATCH = 0.25  # of a patch's area, that a piece of tissue has at least
LEAST_TISSUE = 0.05  # of a patch, that is not glass by itself: with less it looks like the glass around it
FAR = 0.5  # of the tissue of the overview, that the patches cover at least without a warning


@dataclass(frozen=True)
class Tissue:
    """What was found of tissue on a slide."""

    patches: NDArray[np.int32]  # [N, 2] top-left corners in level-0 pixels, row by row
    patch_px: int  # edge of a patch in level-0 pixels
    overview: NDArray[np.uint8]  # RGB [h, w, 3], in which it was looked for
    mask: NDArray[np.bool_] | None  # [h, w]; None: the whole slide was taken
    scale: float  # level-0 pixels of an overview pixel
    warning: str = ""  # one sentence

    @property
    def share(self) -> float:
        """Of the slide that is tissue."""
        return 1.0 if self.mask is None else float(self.mask.mean())


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


def find_patches(
    image: AbstractSlide, name: str, mpp: float, patch_px: int, method: TissueMethod = "glass", background: float = 0.3,
    dark: bool = False,
) -> Tissue:  # fmt: skip
    """The patches of a slide that lie on tissue.

    Args:
        mpp: microns per level-0 pixel.
        patch_px: edge of a patch in level-0 pixels.
        method: how tissue is told from glass: "glass" by the difference from the slide's own glass, for any stain;
            "entropy" by lazyslide's texture of stained tissue; "none" takes the whole slide.
        background: the largest share of a patch that may lie beside the tissue.
        dark: the slide may have a dark ground.

    Raises:
        SlideError: no tissue, no patch fits on it, or a dark ground that was not asked for.
    """
    width, height = image.dimensions
    if min(width, height) < patch_px:
        raise SlideError(
            f"{name}: found {width} x {height} pixels, wanted at least one patch of {patch_px} x {patch_px}"
        )
    reader = _Overview(image, name, mpp, patch_px)
    scale = reader.properties.level_downsample[1]
    picture = reader.get_region(0, 0, *reader.overview, level=1)
    ground = has_dark_ground(picture)
    if ground and not dark:
        raise SlideError(
            f"{name}: found a dark ground, as fluorescence has, wanted brightfield; "
            "--channels says which three channels to take all the same"
        )
    mask, raw, warning = None, None, ""
    if method == "glass":
        seen = 255 - picture if ground else picture
        glass = find_glass(seen)
        raw = tissue_mask(seen, glass) & _within(_bounds(image), picture.shape[:2], scale)
        mask = clean(raw, max(1, round(CLOSE_UM / (mpp * scale))), LEAST_OF_PATCH * (patch_px / scale) ** 2)
        if not glass.found:
            warning = "no glass was found on the slide; what differs from white was taken for tissue"
    patches, mask = _tile(reader, name, patch_px, method, background, mask)
    if raw is not None:
        patches = patches[_share(raw, patches / scale, patch_px / scale) >= LEAST_TISSUE]
    if not len(patches):
        raise SlideError(
            f"{name}: found tissue, but no patch of {patch_px} level-0 pixels of which "
            f"{1 - background:.0%} lie on it, wanted at least one"
        )
    if raw is not None and (covered := _covered(raw, patches / scale, patch_px / scale)) < FAR:
        warning = f"the patches cover {covered:.0%} of what the overview shows beside glass"
    return Tissue(patches, patch_px, picture, mask, scale, warning)


def _within(bounds: list[int], shape: tuple[int, ...], scale: float) -> NDArray[np.bool_]:
    """[h, w]: within the region that was scanned."""
    x, y, width, height = (value / scale for value in bounds)
    inside = np.zeros(shape, bool)
    inside[int(np.floor(y)) : int(np.ceil(y + height)), int(np.floor(x)) : int(np.ceil(x + width))] = True
    return inside


def _tile(
    reader: _Overview, name: str, patch_px: int, method: TissueMethod, background: float, mask: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int32], NDArray[np.bool_] | None]:
    """(patches, mask), tiled by lazyslide."""
    import lazyslide
    from lazyslide.cv.mask import BinaryMask
    from shapely.affinity import scale as scaled
    from wsidata.io import add_tissues

    slide, factor = WSIData(reader=reader), reader.properties.level_downsample[1]
    # «No tissue» and «no tiles» are warnings there and errors here.
    logging.getLogger("lazyslide").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = True
        if method == "entropy":
            found = lazyslide.pp.find_tissues(slide, level=1, method=method) is not False
        elif mask is not None:
            pieces = BinaryMask(mask.astype(np.uint8)).to_polygons(detect_holes=True).geometry if mask.any() else []
            found = len(pieces) > 0
            if found:
                add_tissues(slide, key="tissues", tissues=[scaled(p, factor, factor, origin=(0, 0)) for p in pieces])
        if not found:
            raise SlideError(f"{name}: found no tissue ({method}), wanted some; --tissue none takes the whole slide")
        tiled = lazyslide.pp.tile_tissues(
            slide,
            patch_px,
            background_fraction=background,
            tissue_key=None if method == "none" else "tissues",
            key_added=None,
            return_tiles=True,
        )
    tiles = None if tiled is None else tiled[0]
    corners = np.empty((0, 2)) if tiles is None else tiles.geometry.bounds[["minx", "miny"]].to_numpy()
    limit = np.array(reader.properties.shape[::-1])
    inside = (corners >= 0).all(axis=1) & (corners + patch_px <= limit).all(axis=1)
    patches = np.unique(corners[inside].astype(np.int32)[:, ::-1], axis=0)[:, ::-1]  # two tissues may share a place
    return np.ascontiguousarray(patches), mask


def _share(mask: NDArray[np.bool_], corners: NDArray, edge: float) -> NDArray[np.float64]:
    """Of each square, the share of pixels that are set; places in the mask's own pixels."""
    sums = np.pad(mask.astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    low = np.floor(corners).astype(np.int64)
    high = np.minimum(np.maximum(np.ceil(corners + edge).astype(np.int64), low + 1), mask.shape[::-1])
    inside = sums[high[:, 1], high[:, 0]] - sums[low[:, 1], high[:, 0]] - sums[high[:, 1], low[:, 0]]
    return (inside + sums[low[:, 1], low[:, 0]]) / np.maximum((high - low).prod(axis=1), 1)


def _covered(mask: NDArray[np.bool_], corners: NDArray, edge: float) -> float:
    """The share of the set pixels that the squares cover."""
    covered = np.zeros(mask.shape, bool)
    for x, y in corners.tolist():
        covered[int(y) : int(np.ceil(y + edge)), int(x) : int(np.ceil(x + edge))] = True
    return float((covered & mask).sum() / max(1, mask.sum()))
