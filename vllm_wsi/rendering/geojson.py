"""The kept patches as GeoJSON for QuPath."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_wsi.slides.feature_file import Unit
from vllm_wsi.slides.places import Origin, PatchSize, guesses
from vllm_wsi.slides.regions import Level0Rects

NAMESPACE = uuid.UUID("6f4f8f0e-4a60-5d0c-9d0b-2d8b8a1f4f57")  # of the ids of our GeoJSON features
KEPT_COLOUR = (255, 200, 0)


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
