"""The figure of an evaluation: accuracy by the length of slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_wsi.questions.length_bins import LENGTH_BINS
from vllm_wsi.rendering.figure import save_figure

from .runner import MAIN


def draw_lengths(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes a PNG file, and returns its path.

    Args:
        rows: of the summary's table, those by length.

    Raises:
        SetupError: matplotlib is not installed.
    """
    used = [name for name in LENGTH_BINS if any(row["group"] == name for row in rows)]
    runs = list(dict.fromkeys((row["mode"], row["arm"]) for row in rows))

    def draw(axes: Any) -> None:
        for place, (mode, arm) in enumerate(runs):
            own = [row for row in rows if (row["mode"], row["arm"]) == (mode, arm)]
            x = [used.index(row["group"]) + 0.08 * (place - (len(runs) - 1) / 2) for row in own]
            y = np.array([row["accuracy"] for row in own])
            error = [y - [row["low"] for row in own], [row["high"] for row in own] - y]
            style: dict[str, Any] = {"linestyle": "-" if arm == MAIN else ":", "capsize": 2, "marker": "o"}
            axes.errorbar(x, y, error, label=f"{mode} {arm}", markersize=4, **style)
        counts = {row["group"]: row["asked"] for row in reversed(rows)}
        axes.set_xticks(range(len(used)), [f"{name}\n{counts[name]}" for name in used])
        axes.set(xlabel="patches of the slide; questions", ylabel="accuracy, 95 % over slides", ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=8)

    return save_figure(path, draw)
