"""Where patches lie on the slide: level-0 rectangles.

Coordinates in the wrong unit are a common bug of this field. So `level0_rects` alone makes `Level0Rects` and turns
microns into pixels, and everything that draws or exports takes `Level0Rects`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NewType

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError

from .feature_file import CoordUnit
from .places import PatchSize, patch_size
from .units import positive_number

__all__ = ["Level0Rects", "PatchSize", "check_image", "extent", "level0_rects", "patch_size", "said_size"]

Level0Rects = NewType("Level0Rects", np.ndarray)
"""float64 [n, 4] of x, y (top-left corner), width, height in level-0 pixels."""


def level0_rects(
    name: str,
    coords: NDArray | None,
    unit: CoordUnit | None,
    size: PatchSize | None,
    metadata: Mapping[str, str],
    mpp: float | None = None,
) -> Level0Rects:
    """Rectangles of patches.

    Args:
        coords: [n, 2] top-left corners in `unit`; None: the file has none.
        size: edge of a patch; None: not known.
        metadata: the file's own, asked for `mpp` where it is not given.
        mpp: microns per level-0 pixel, needed where anything is in microns.

    Raises:
        SlideError: there are no coordinates, no size, or microns and no mpp that is a finite number above 0; or a
            place is not finite.
    """
    if coords is None or unit is None:
        found, wanted = (
            ("none", "the place of each patch") if coords is None else ("no unit", "coord_unit given, px or um,")
        )
        raise SlideError(f"{name}: coords: found {found}, wanted {wanted} to show it on the slide")
    if size is None:
        raise SlideError(f"{name}: patch_size_level0: found none, wanted the size of a patch in level-0 pixels")
    scales: dict[str | None, float] = {"px": 1.0}
    if "um" in (unit, size.unit):
        said = metadata.get("mpp") if mpp is None else mpp
        scale = positive_number(said)
        if scale is None:
            found = "none" if said is None else f"{said!r:.40}"  # a header's text may be long
            raise SlideError(
                f"{name}: mpp: found {found} with coordinates in microns, "
                "wanted microns per level-0 pixel, a finite number above 0, to place them"
            )
        scales["um"] = 1 / scale
    rects = np.empty((len(coords), 4))
    with np.errstate(all="ignore"):  # what overflows is refused below
        rects[:, :2] = np.asarray(coords, np.float64) * scales[unit]
        rects[:, 2:] = size.value * scales[size.unit]
    if not np.isfinite(rects).all():  # NaN in the file, or an mpp so small that pixels overflow
        raise SlideError(f"{name}: coords: found a place that is not finite, wanted finite level-0 pixels")
    return Level0Rects(rects)


def said_size(metadata: Mapping[str, str]) -> tuple[float, float] | None:
    """(width, height) of the slide in level-0 pixels as the file says; None: it does not say both."""
    width, height = (
        positive_number(metadata.get(key)) or positive_number(metadata.get(f"level0_{key}"))
        for key in ("width", "height")
    )
    return None if width is None or height is None else (width, height)


def extent(rects: Level0Rects, metadata: Mapping[str, str]) -> tuple[float, float]:
    """(width, height) of the slide in level-0 pixels: what the file says, and never less than its patches span."""
    width, height = said_size(metadata) or (0.0, 0.0)
    right, bottom = (rects[:, :2] + rects[:, 2:]).max(axis=0)
    return max(width, float(right)), max(height, float(bottom))


def check_image(
    image: str, size_px: tuple[float, float], name: str, metadata: Mapping[str, str], rects: Level0Rects | None
) -> None:
    """Refuses another slide's image, or another copy's.

    The last patches may reach beyond the slide: CLAM pads them. So each must only begin on it. And a size beyond which
    patches begin is none of a slide: some files call a patch's edges `width` and `height`.

    Args:
        image: its name, for the error.
        size_px: (width, height) of the image.
        name, metadata: of the feature file.
        rects: of its patches, better of all than of some; None: they cannot be placed.

    Raises:
        SlideError: the file says another size of the slide, or a patch begins beyond the image.
    """
    said = said_size(metadata)
    found = f"{image}: found {size_px[0]:.9g} x {size_px[1]:.9g} px, wanted"
    if said is not None and said != tuple(size_px) and (rects is None or _first_beyond(rects, said) is None):
        raise SlideError(f"{found} {said[0]:.9g} x {said[1]:.9g}, as {name} says; the image may be another slide's")
    if rects is not None and (corner := _first_beyond(rects, size_px)) is not None:
        raise SlideError(
            f"{found} more, as {name} has a patch at {corner[0]:.9g}, {corner[1]:.9g}; the image may be another slide's"
        )


def _first_beyond(rects: Level0Rects, size_px: tuple[float, float]) -> tuple[float, float] | None:
    """Corner of the first patch that begins beyond the size."""
    beyond = (rects[:, :2] >= size_px).any(axis=1)
    return tuple(rects[int(beyond.argmax()), :2].tolist()) if beyond.any() else None
