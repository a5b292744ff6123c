"""The patches of a slide: a grid over what was scanned, and of it what lies on tissue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from openslide import AbstractSlide

from vllm_wsi.errors import SlideError

from .overview import Overview, read_overview
from .tissue import Tissue, find_tissue, is_dark_ground

TissueMethod = Literal["otsu", "none"]
FEW_PATCHES = 0.5  # of the tissue's area, below which the patches do not stand for it


@dataclass(frozen=True)
class Tiling:
    """The patches of a slide and what they were chosen by."""

    corners: NDArray[np.int32]  # [N, 2] top-left, in level-0 pixels, row by row
    patch_px: int  # edge in level-0 pixels
    overview: Overview
    tissue: Tissue | None  # None: the whole slide was asked for
    warnings: tuple[str, ...]


# Many parameters: what decides the patches of a slide.
def find_patches(
    image: AbstractSlide,
    name: str,
    mpp: float,
    patch_px: int,
    method: TissueMethod = "otsu",
    background: float = 0.3,
    dark_ground: bool = False,
    step_px: int | None = None,
) -> Tiling:
    """Patches on tissue, on a grid.

    Args:
        mpp: microns per level-0 pixel.
        patch_px: edge of a patch in level-0 pixels.
        method: how tissue is told from glass; "none" takes the whole slide.
        background: the largest share of a patch that may lie beside the tissue.
        dark_ground: take light on a dark ground too, as of fluorescence.
        step_px: from one patch to the next in level-0 pixels; less than `patch_px`, they overlap. None: `patch_px`,
            no patch overlaps another.

    Raises:
        SlideError: no tissue, no patch fits on it, or a dark ground that was not asked for.
    """
    step_px = patch_px if step_px is None else step_px
    width, height = image.dimensions
    if min(width, height) < patch_px:
        raise SlideError(
            f"{name}: found {width} x {height} pixels, wanted at least one patch of {patch_px} x {patch_px}"
        )
    overview = read_overview(image, name, mpp, patch_px)
    dark = is_dark_ground(overview.rgb, overview.scanned)
    if dark and not dark_ground:
        raise SlideError(
            f"{name}: found light on a dark ground, as of fluorescence, wanted stained tissue on bright glass; "
            "--channels says which three channels are to be encoded all the same"
        )
    if method == "none":
        return Tiling(_grid(image, overview, patch_px, step_px, None), patch_px, overview, None, ())
    rgb = 255 - overview.rgb if dark else overview.rgb
    tissue = find_tissue(rgb, overview.scanned, name, patch_px / max(overview.scale))
    corners = _grid(image, overview, patch_px, step_px, tissue.mask)
    shares = covered(tissue.mask, overview, corners, patch_px)
    corners = corners[shares >= 1 - background]
    if not len(corners):
        raise SlideError(
            f"{name}: found tissue on {tissue.share:.2%} of the slide, but no patch of {patch_px} level-0 pixels of "
            f"which {1 - background:.0%} lie on it, wanted at least one"
        )
    area = tissue.mask.sum() * overview.scale[0] * overview.scale[1]
    warnings = tissue.warnings
    if (part := _area(corners, patch_px, step_px, overview) / area) < FEW_PATCHES:
        warnings += (f"patches cover {part:.0%} of the tissue found, which lies in pieces smaller than they",)
    return Tiling(corners, patch_px, overview, tissue, warnings)


def _grid(
    image: AbstractSlide, overview: Overview, patch_px: int, step_px: int, mask: NDArray[np.bool_] | None
) -> NDArray[np.int32]:
    """[n, 2] corners of all patches that lie within the slide; the first lies where the tissue or the scan begins."""
    starts, ends = [], []
    for axis, (origin, scale) in enumerate(zip((overview.x_px, overview.y_px), overview.scale, strict=True)):
        count = overview.scanned.shape[1 - axis]
        first = 0 if mask is None else int(mask.any(axis=axis).argmax())
        start, end = origin + int(first * scale), min(round(origin + count * scale), image.dimensions[axis])
        starts.append(min(start, max(origin, end - patch_px)))  # tissue at the very end, less than a patch
        ends.append(end)
    x, y = (
        np.arange(start, end - patch_px + 1, step_px, dtype=np.int32) for start, end in zip(starts, ends, strict=True)
    )
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _area(corners: NDArray[np.int32], patch_px: int, step_px: int, overview: Overview) -> float:
    """Level-0 pixels that lie in at least one patch; of patches that overlap, to the overview's pixels."""
    if step_px >= patch_px:
        return float(len(corners) * patch_px**2)
    scale, origin = np.array(overview.scale), np.array([overview.x_px, overview.y_px])
    starts, ends = (np.rint((corners + add - origin) / scale).astype(int) for add in (0, patch_px))
    inside = np.zeros(overview.scanned.shape, bool)
    for (x0, y0), (x1, y1) in zip(starts.tolist(), ends.tolist(), strict=True):
        inside[y0:y1, x0:x1] = True
    return float(inside.sum() * scale.prod())


def covered(
    mask: NDArray[np.bool_], overview: Overview, corners: NDArray[np.int32], patch_px: int
) -> NDArray[np.float64]:
    """[n] share of each patch that lies on the mask, parts of the mask's pixels counted as parts."""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    sums[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)
    left_top = (corners - [overview.x_px, overview.y_px]) / overview.scale
    right_bottom = left_top + patch_px / np.array(overview.scale)

    def up_to(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tissue left of and above a place, between the mask's pixels as well."""
        x, y = np.clip(x, 0, mask.shape[1]), np.clip(y, 0, mask.shape[0])
        column, row = np.minimum(x.astype(int), mask.shape[1] - 1), np.minimum(y.astype(int), mask.shape[0] - 1)
        u, v = x - column, y - row
        upper = sums[row, column] * (1 - u) + sums[row, column + 1] * u
        lower = sums[row + 1, column] * (1 - u) + sums[row + 1, column + 1] * u
        return upper * (1 - v) + lower * v

    (x0, y0), (x1, y1) = left_top.T, right_bottom.T
    inside = up_to(x1, y1) - up_to(x0, y1) - up_to(x1, y0) + up_to(x0, y0)
    return inside / np.prod(right_bottom - left_top, axis=1)
