"""A small picture of what `encode` took of a slide: the tissue's outline, the patches, pen marks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .patches import Tiling
from .png import write_png

QC_SIDES = 768, 1536  # its longest side in its own pixels, at least and at most
TISSUE, PATCH, INK = (0, 190, 60), (30, 80, 255), (255, 140, 0)


def write_qc(path: Path, tiling: Tiling) -> None:
    """Writes the overview with patches in blue, the tissue's outline in green and pen marks in orange."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, draw_qc(tiling))


def draw_qc(tiling: Tiling) -> np.ndarray:
    """RGB [h, w, 3] of what was scanned, its longer side within `QC_SIDES`."""
    overview = tiling.overview
    height, width = overview.scanned.shape
    longest = max(width, height)
    shrink = longest / np.clip(longest, *QC_SIDES)
    size = max(1, round(width / shrink)), max(1, round(height / shrink))
    picture = Image.fromarray(overview.rgb).resize(size, Image.Resampling.BOX)
    draw = ImageDraw.Draw(picture)
    origin, scale = np.array([overview.x_px, overview.y_px]), np.array(overview.scale) * shrink
    corners = (tiling.corners - origin) / scale
    for (x0, y0), (x1, y1) in zip(corners.tolist(), (corners + tiling.patch_px / scale).tolist(), strict=True):
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=PATCH)
    drawn = np.array(picture)
    if tiling.tissue is not None:
        for mask, colour in ((tiling.tissue.mask, TISSUE), (tiling.tissue.ink, INK)):
            small = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
            drawn[small & ~ndimage.binary_erosion(small)] = colour
    return drawn
