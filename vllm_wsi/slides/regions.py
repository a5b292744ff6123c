"""Where patches lie on the slide: level-0 rectangles, and QuPath GeoJSON of them.

Coordinates in the wrong unit are this field's classic bug: only `level0_rects` makes `Level0Rects`, it alone turns
microns into pixels, and what draws or exports takes nothing else.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NewType

import numpy as np
from numpy.typing import NDArray

from .feature_file import CoordUnit, SlideError
from .places import Origin, PatchSize, guesses, patch_size
from .units import Unit, positive_number

__all__ = ["Level0Rects", "PatchSize", "extent", "geojson", "level0_rects", "patch_size", "said_size"]

Level0Rects = NewType("Level0Rects", np.ndarray)
"""float64 [n, 4] of x, y (top-left corner), width, height in level-0 pixels."""

NAMESPACE = uuid.UUID("6f4f8f0e-4a60-5d0c-9d0b-2d8b8a1f4f57")  # of the ids of our GeoJSON features
KEPT_COLOUR = (255, 200, 0)


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
        found, wanted = ("none", "the place of each patch") if coords is None else ("no unit", "it given, px or um,")
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


def geojson(
    rects: Level0Rects,
    scores: Sequence[float],
    rows: Sequence[int],
    slide: str,
    unit: Unit,
    size: PatchSize,
    origin: Origin,
    cropped: bool = True,
) -> dict[str, Any]:
    """Kept patches as a QuPath FeatureCollection: full-resolution pixels, closed rings, score as a measurement.

    Args:
        rects, scores, rows: of each kept patch.
        slide: names the slide; the same slide and row get the same id.
        unit, size: of the coordinates and of a patch, whose sources the file tells.
        origin: of the slide's bounds.
        cropped: QuPath counts from that origin, as it shows such slides cropped to their bounds; False: the file holds
            openslide's own pixels.
    """
    ranks = np.empty(len(rows), np.int64)
    ranks[np.argsort(-np.asarray(scores), kind="stable")] = np.arange(1, len(rows) + 1)
    left, top = (origin.x, origin.y) if cropped else (0.0, 0.0)
    guessed = {"guess": " and ".join(guesses(unit, size))} if guesses(unit, size) else {}
    features = []
    for (x, y, width, height), score, row, rank in zip(rects.tolist(), scores, rows, ranks.tolist(), strict=True):
        x, y = x - left, y - top
        corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(NAMESPACE, f"{slide}\0{row}")),
                "geometry": {"type": "Polygon", "coordinates": [corners]},
                "properties": {
                    "objectType": "annotation",
                    "name": f"kept patch {rank}",
                    "classification": {"name": "kept patch", "color": list(KEPT_COLOUR)},
                    "measurements": {"score": float(score), "rank": rank, "row": int(row)},
                    **({"metadata": guessed} if guessed else {}),
                },
            }
        )
    places = {
        "coord_unit": {"value": unit.unit, "source": unit.source},
        "patch_size": size._asdict(),
        "origin": {"x": left, "y": top, "bounds": [origin.x, origin.y], "source": origin.source},
    }
    return {"type": "FeatureCollection", "places": places, "features": features}
