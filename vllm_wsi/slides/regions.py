"""Where patches lie on the slide: level-0 rectangles, and QuPath GeoJSON of them.

Coordinates in the wrong unit are this field's classic bug: only `level0_rects` makes `Level0Rects`, it alone turns
microns into pixels, and what draws or exports takes nothing else.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, NewType

import numpy as np
from numpy.typing import NDArray

from .features import CoordUnit, SlideError

Level0Rects = NewType("Level0Rects", np.ndarray)
"""float64 [n, 4] of x, y (top-left corner), width, height in level-0 pixels."""

NAMESPACE = uuid.UUID("6f4f8f0e-4a60-5d0c-9d0b-2d8b8a1f4f57")  # of the ids of our GeoJSON features
KEPT_COLOUR = (255, 200, 0)
GRID_SAMPLE = 1 << 14  # coordinates that the spacing is looked up in: this runs for each slide that is selected


def positive_number(said: str | float | None) -> float | None:
    """A finite number above 0, as every size and scale here must be; None for anything else, NaN and text included."""
    if said is None or isinstance(said, bool):
        return None
    try:
        value = float(said)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) and value > 0 else None


class PatchSize(NamedTuple):
    """Edge of a file's square patches."""

    value: float
    unit: CoordUnit
    source: Literal["file", "grid", "given"]  # grid: not written in the file, but the spacing of its coordinates


def patch_size(metadata: Mapping[str, str], coords: NDArray, unit: CoordUnit) -> PatchSize | None:
    """What the file says of its patches' size, or else the commonest step between neighbours in a row.

    Args:
        coords: [N, 2] of all patches, in `unit`.
    """
    key = "patch_size_level0" if unit == "px" else "tile_size_um"
    said = positive_number(metadata.get(key))
    if said is not None:
        return PatchSize(said, unit, "file")
    coords = coords[:GRID_SAMPLE]
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    x, y = coords[order, 0], coords[order, 1]
    steps = np.diff(x)[np.diff(y) == 0]
    found, counts = np.unique(steps[steps > 0], return_counts=True)
    return PatchSize(float(found[counts.argmax()]), unit, "grid") if len(found) else None


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
        raise SlideError(f"{name}: coords: found none, wanted the place of each patch to show it on the slide")
    if size is None:
        raise SlideError(f"{name}: patch_size_level0: found none, wanted the size of a patch in level-0 pixels")
    scales = {"px": 1.0}
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


def geojson(rects: Level0Rects, scores: Sequence[float], rows: Sequence[int], slide: str) -> dict[str, Any]:
    """Kept patches as a QuPath FeatureCollection: full-resolution pixels, closed rings, score as a measurement.

    Args:
        rects, scores, rows: of each kept patch.
        slide: names the slide; the same slide and row get the same id.
    """
    ranks = np.empty(len(rows), np.int64)
    ranks[np.argsort(-np.asarray(scores), kind="stable")] = np.arange(1, len(rows) + 1)
    features = []
    for (x, y, width, height), score, row, rank in zip(rects.tolist(), scores, rows, ranks.tolist(), strict=True):
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
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}
