"""Pictures of a selection: a heat map of all scores, a montage of the kept patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vllm_wsi.slides.regions import Level0Rects

from .geojson import KEPT_COLOUR

HEAT_SIDE = 2048  # longest side of a heat map, in its own pixels
HEAT_ALPHA = 0.55
EMPTY = 245  # grey of a slide whose image is not at hand
NONFINITE = (128, 128, 128)
# matplotlib's inferno (CC0) at ten places: dark is low, light is high, legible in grey and to colour-blind readers.
INFERNO = np.array(
    [(0, 0, 4), (27, 12, 65), (74, 12, 107), (120, 28, 109), (165, 44, 96), (207, 68, 70), (237, 105, 37),
     (251, 155, 6), (247, 209, 61), (252, 255, 164)]
)  # fmt: skip
COLUMNS, CELL, LABEL = 8, 160, 20  # of a montage; pixels of a cell and of the line below it


def rank_normalise(scores: NDArray) -> NDArray[np.float64]:
    """Ranks scaled to 0 .. 1, ties sharing their mean; NaN where a score is not finite. Nothing is blurred."""
    scores = np.asarray(scores, np.float64)
    finite = np.isfinite(scores)
    _, place, counts = np.unique(scores[finite], return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[place]
    out = np.full(scores.shape, np.nan)
    out[finite] = ranks / max(1, finite.sum() - 1) if finite.sum() > 1 else 1.0
    return out


def colours(values: NDArray) -> NDArray[np.uint8]:
    """[n, 3] RGB of values in 0 .. 1; grey for NaN."""
    stops = np.linspace(0, 1, len(INFERNO))
    known = np.nan_to_num(values)
    rgb = np.stack([np.interp(known, stops, INFERNO[:, channel]) for channel in range(3)], axis=-1)
    rgb[np.isnan(values)] = NONFINITE
    return rgb.round().astype(np.uint8)


def heat_overlay(
    rects: Level0Rects, scores: NDArray, size_px: tuple[float, float], max_side: int = HEAT_SIDE
) -> NDArray[np.uint8]:
    """RGBA [h, w, 4] over the whole slide: patches in the colour of their score's rank, all else transparent.

    Where patches overlap, each pixel shows the patch whose middle is nearest, to a pixel, and of equally near ones the
    higher score: a high score does not cover its neighbours, and nothing is averaged.

    Args:
        rects, scores: of all N patches.
        size_px: (width, height) of the slide at level 0.
    """
    scale = max(size_px) / max_side
    width, height = (max(1, round(side / scale)) for side in size_px)
    overlay = np.zeros((height, width, 4), np.uint8)
    values = rank_normalise(scores)
    order = np.argsort(np.where(np.isnan(values), -1, values), kind="stable")  # the highest is painted last
    paint = np.concatenate([colours(values), np.full((len(values), 1), 255, np.uint8)], axis=1)[order]
    # What lies beyond the slide is cut off; coordinates may be anything.
    corners = np.clip(rects[order], -max(size_px), 2 * max(size_px))
    left_top = np.floor(corners[:, :2] / scale).astype(np.int64)
    right_bottom = np.maximum(np.floor((corners[:, :2] + corners[:, 2:]) / scale).astype(np.int64), left_top + 1)
    places = np.concatenate([np.maximum(left_top, 0), np.maximum(right_bottom, 0)], axis=1).tolist()
    for (left, top, right, bottom), colour in zip(places, paint, strict=True):
        overlay[top:bottom, left:right] = colour
    drawn = np.clip(places, 0, [width, height, width, height]) if len(places) else np.zeros((0, 4), int)
    if (drawn[:, 2:] - drawn[:, :2]).clip(0).prod(axis=1).sum() > (overlay[..., 3] > 0).sum():
        middles = ((corners[:, :2] + corners[:, 2:] / 2) / scale).tolist()
        _paint_by_nearness(overlay, places, middles, paint)
    return overlay


def _paint_by_nearness(
    overlay: NDArray[np.uint8], places: list[list[int]], middles: list[list[float]], paint: NDArray[np.uint8]
) -> None:
    """Paints each pixel in the colour of the patch on it whose middle is nearest, along the farther of the two axes."""
    height, width = overlay.shape[:2]
    nearest = np.full((height, width), np.inf, np.float32)
    columns, rows = np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32) + 0.5
    for (left, top, right, bottom), (x, y), colour in zip(places, middles, paint, strict=True):
        part = np.s_[top:bottom, left:right]
        # In whole pixels, so that of several patches within one pixel the highest is seen.
        away = np.floor(np.maximum(np.abs(rows[top:bottom] - y)[:, None], np.abs(columns[left:right] - x)[None]))
        nearer = away <= nearest[part]
        nearest[part][nearer] = away[nearer]
        overlay[part][nearer] = colour


def heat_map(
    overlay: NDArray[np.uint8],
    background: NDArray[np.uint8] | None,
    kept: Level0Rects,
    size_px: tuple[float, float],
) -> NDArray[np.uint8]:
    """RGB [h, w, 3]: the overlay upon the slide's thumbnail (grey without one), kept patches outlined.

    Args:
        overlay: [h, w, 4] as `heat_overlay` makes it.
        background: thumbnail of any size.
        kept: rectangles of the kept patches.
        size_px: (width, height) of the slide at level 0.
    """
    height, width = overlay.shape[:2]
    if background is None:
        base, alpha = np.full((height, width, 3), EMPTY, np.uint8), 1.0
    else:
        base, alpha = np.asarray(Image.fromarray(background).resize((width, height))), HEAT_ALPHA
    share = overlay[..., 3:] / 255 * alpha
    picture = Image.fromarray((base * (1 - share) + overlay[..., :3] * share).round().astype(np.uint8))
    draw, scale = ImageDraw.Draw(picture), width / size_px[0]
    for x, y, w, h in (kept * scale).tolist():
        draw.rectangle((x, y, max(x, x + w - 1), max(y, y + h - 1)), outline=KEPT_COLOUR, width=2)
    return np.asarray(picture)


def montage(
    rects: Level0Rects,
    scores: Sequence[float],
    rows: Sequence[int],
    size_px: tuple[float, float],
    read_patch: Callable[[tuple[float, float, float, float], int], NDArray[np.uint8]] | None,
) -> NDArray[np.uint8]:
    """RGB picture of the kept patches, eight in a row, best first, with rank, score and row.

    Args:
        read_patch: (x, y, width, height in level-0 pixels; pixels of the result) -> RGB square; None: each cell
            shows where on the slide its patch lies.
    """
    lines = math.ceil(len(rows) / COLUMNS)
    picture = Image.new("RGB", (COLUMNS * CELL, lines * (CELL + LABEL)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for rank, i in enumerate(np.argsort(-np.asarray(scores), kind="stable").tolist()):
        left, top = rank % COLUMNS * CELL, rank // COLUMNS * (CELL + LABEL)
        if read_patch is not None:
            cell = read_patch(tuple(rects[i].tolist()), CELL - 2)
            picture.paste(Image.fromarray(cell), (left + 1, top + 1))
        else:
            _draw_place(draw, rects, i, (left, top), size_px)
        draw.text((left + 3, top + CELL + 2), f"{rank + 1}  {scores[i]:+.3f}  #{rows[i]}", "black", font)
    return np.asarray(picture)


def _draw_place(
    draw: ImageDraw.ImageDraw, rects: Level0Rects, chosen: int, corner: tuple[int, int], size_px: tuple[float, float]
) -> None:
    scale = (CELL - 10) / max(size_px)
    left, top = corner[0] + 5, corner[1] + 5
    draw.rectangle((left, top, left + size_px[0] * scale, top + size_px[1] * scale), (EMPTY,) * 3, "grey")
    for i in [*range(len(rects)), chosen]:
        x, y, w, h = (rects[i] * scale).tolist()
        radius = 3 if i == chosen else 1
        x, y = left + x + w / 2, top + y + h / 2
        colour = "red" if i == chosen else "silver"
        draw.rectangle((x - radius, y - radius, x + radius, y + radius), colour)
