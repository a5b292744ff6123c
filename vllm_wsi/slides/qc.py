"""A small picture of what `encode` took for tissue, and of the patches that it made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from .pictures import write_png
from .tissue import Tissue

QC_SIDE = 1600  # longest side, in its own pixels
MASK_COLOUR, PATCH_COLOUR = (0, 120, 60), (255, 140, 0)


def qc_picture(tissue: Tissue) -> NDArray[np.uint8]:
    """RGB [h, w, 3]: the overview, the outline of the tissue in green, the patches as orange squares."""
    height, width = tissue.overview.shape[:2]
    shrink = max(1.0, max(width, height) / QC_SIDE)
    size = (max(1, round(width / shrink)), max(1, round(height / shrink)))
    picture = Image.fromarray(tissue.overview).resize(size, Image.Resampling.BILINEAR)
    draw, scale = ImageDraw.Draw(picture), tissue.scale * shrink
    edge = tissue.patch_px / scale
    for x, y in (tissue.patches / scale).tolist():
        draw.rectangle((x, y, max(x + edge - 1, x), max(y + edge - 1, y)), outline=PATCH_COLOUR)
    pixels = np.asarray(picture).copy()
    if tissue.mask is not None:
        mask = np.asarray(Image.fromarray(tissue.mask).resize(size, Image.Resampling.NEAREST))
        pixels[ndimage.binary_dilation(mask) & ~mask] = MASK_COLOUR
    return pixels


def write_qc(path: Path, tissue: Tissue) -> None:
    """Writes `qc_picture` as a PNG file, which appears under its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, qc_picture(tissue))
