"""Figures of a tissue study: recall and accuracy by share of tumour, calibration, and the true map beside heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.rendering.figure import save_figure
from vllm_wsi.rendering.pictures import colours, rank_normalise

from .study import LEARNED
from .tissue_tables import ANY

Row = Mapping[str, Any]
TRUE, OTHER = (178, 24, 43), (233, 226, 230)  # of the true map: tumour, the rest
OUTLINE = (0, 150, 255)  # of kept patches: stands out from every colour of a heat map
BLANK = (255, 255, 255)
CELL, GAP = 6, 24  # pixels of a patch, and between two maps


def draw_by_share(path: Path, rows: Sequence[Row], length: str, measure: str, label: str) -> Path | None:
    """One line a policy: a measure with its interval by share of tumour. None where the rows have no such length.

    Args:
        rows: of `selection_table`, or of one kind in `answer_table`.
        measure: a column with `_low` and `_high` beside it.
    """
    rows = [row for row in rows if str(row["length"]) == length and str(row["share"]) not in ("", ANY)]
    if not rows:
        return None
    shares = sorted({float(row["share"]) for row in rows})
    policies = list(dict.fromkeys(row["policy"] for row in rows))

    def draw(axes: Any) -> None:
        for number, policy in enumerate(policies):
            part = sorted((row for row in rows if row["policy"] == policy), key=lambda row: float(row["share"]))
            places = [shares.index(float(row["share"])) + (number - len(policies) / 2) * 0.03 for row in part]
            y, low, high = (np.array([float(row[measure + end]) for row in part]) for end in ("", "_low", "_high"))
            style = {"linewidth": 2.5, "zorder": 5} if policy == LEARNED else {"linewidth": 1}
            axes.errorbar(
                places, y, yerr=(y - low, high - y), marker="o", markersize=4, capsize=2, label=policy, **style
            )
        axes.set_xticks(range(len(shares)), [f"{100 * share:g} %" for share in shares])
        axes.set(xlabel=f"share of tumour, N = {length}", ylabel=label, ylim=(0, 1.03))
        axes.legend(frameon=False, fontsize=7, ncols=3)

    return save_figure(path, draw)


def draw_reliability(path: Path, rows: Sequence[Row]) -> Path:
    """Accuracy against confidence, one line a kind of question; dots as large as the answers are many.

    Args:
        rows: of `reliability_table`.
    """

    def draw(axes: Any) -> None:
        axes.plot((0, 1), (0, 1), color="0.6", linestyle=":", linewidth=1)
        for kind in dict.fromkeys(row["kind"] for row in rows):
            part = [row for row in rows if row["kind"] == kind]
            x, y, size = (
                np.array([float(row[name]) for row in part]) for name in ("confidence", "accuracy", "answers")
            )
            (line,) = axes.plot(x, y, linewidth=1, label=str(kind).replace("_", ", "))
            axes.scatter(x, y, s=10 + 120 * size / size.max(), color=line.get_color())
        axes.set(xlabel="confidence of the answer", ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03))
        axes.legend(frameon=False, fontsize=8)

    return save_figure(path, draw)


def draw_maps(path: Path, panels: Mapping[str, NDArray[np.uint8]]) -> Path:
    """Maps of one slide side by side, as `tissue_maps` makes them, each under its name."""
    first = next(iter(panels.values()))
    blank = np.full((len(first), GAP, 3), BLANK, np.uint8)
    strip = [part for panel in panels.values() for part in (panel, blank)][:-1]

    def draw(axes: Any) -> None:
        axes.imshow(np.concatenate(strip, axis=1), interpolation="nearest")
        for number, title in enumerate(panels):
            axes.text(number * (first.shape[1] + GAP), -8, title, fontsize=7)
        axes.text(0, len(first) + 14, "heat maps: rank of the score, light is high; the best are outlined", fontsize=7)
        axes.set_axis_off()

    return save_figure(path, draw)


def tissue_maps(
    coords_px: NDArray, patch_px: int, is_tumour: NDArray, scores: Mapping[str, NDArray], k: int
) -> dict[str, NDArray[np.uint8]]:
    """RGB [h, w, 3] pictures of a slide: its true map, and a heat map of each scorer's ranks with its best k outlined.

    Args:
        coords_px: [N, 2] top-left corners.
        is_tumour: bool [N].
        scores: name -> [N].
    """
    places = (coords_px - coords_px.min(axis=0)) // patch_px
    width, height = (int(most) + 1 for most in places.max(axis=0))
    truth = np.where(np.asarray(is_tumour, bool)[:, None], TRUE, OTHER)
    panels = {"true map": _map(places, truth, width, height, None)}
    for name, values in scores.items():
        best = np.lexsort((np.arange(len(values)), -values))[:k]
        ranks = colours(rank_normalise(values))
        panels[f"{name}, best {k}"] = _map(places, ranks, width, height, best)
    return panels


def _map(places: NDArray, rgb: NDArray, width: int, height: int, outlined: NDArray | None) -> NDArray[np.uint8]:
    """[height * CELL, width * CELL, 3]; patches lie on a grid."""
    canvas = np.full((height * CELL, width * CELL, 3), BLANK, np.uint8)
    for (x, y), colour in zip(places * CELL, rgb, strict=True):
        canvas[y : y + CELL, x : x + CELL] = colour
    for x, y in () if outlined is None else places[outlined] * CELL:
        inner = canvas[y + 1 : y + CELL - 1, x + 1 : x + CELL - 1].copy()
        canvas[y : y + CELL, x : x + CELL] = OUTLINE
        canvas[y + 1 : y + CELL - 1, x + 1 : x + CELL - 1] = inner
    return canvas
