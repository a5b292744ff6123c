"""Figures of a study, drawn from its CSV files alone, so that they can be drawn again."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import needs_extra
from vllm_wsi.rendering.figure import save_figure

Row = dict[str, str]
CHANCE_STYLE: dict[str, Any] = {"color": "0.6", "linestyle": ":", "linewidth": 1}


def draw_tables(out: str | Path) -> list[Path]:
    """Draws every table of `out` that has a figure; returns the PNG files."""
    out = Path(out)
    figures: dict[str, Callable[..., None]] = {
        "policies": _policies,
        "k_sweep": _k_sweep,
        "ablations": _ablations,
        "soft_hard": _soft_hard,
    }
    drawn = []
    for name, draw in figures.items():
        table = out / f"{name}.csv"
        if table.exists():
            with open(table, newline="") as file:
                rows = list(csv.DictReader(file))
            drawn.append(save_figure(out / f"{name}.png", partial(draw, rows=rows)))
    return drawn


def draw_umap(path: str | Path, features: NDArray, kept: NDArray, key_patches: NDArray | None, title: str) -> Path:
    """Where the kept patches lie among all patches of a slide: UMAP of the features, fixed seed.

    Args:
        features: [N, d], finite.
        kept, key_patches: row numbers.
    """
    with needs_extra("study"):
        from umap import UMAP
    place = UMAP(random_state=0, n_jobs=1).fit_transform(features)

    def draw(axes: Any) -> None:
        axes.scatter(*place.T, s=3, color="0.8", label=f"all {len(features):,} patches", rasterized=True)
        axes.scatter(*place[kept].T, s=28, color="#c0392b", label=f"{len(kept)} kept")
        if key_patches is not None:
            axes.scatter(*place[key_patches].T, s=60, facecolors="none", edgecolors="black", label="key patches")
        axes.set(xticks=[], yticks=[], title=title)
        axes.legend(frameon=False, fontsize=8)

    return save_figure(Path(path), draw)


def _policies(axes: Any, rows: list[Row]) -> None:
    modes = list(dict.fromkeys(row["positions"] for row in rows))
    rows = [row for row in rows if row["positions"] == modes[0]]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    policies = [name for name in dict.fromkeys(row["policy"] for row in rows) if not name.startswith("always")]
    for number, policy in enumerate(policies):
        by_length = {row["length"]: row for row in rows if row["policy"] == policy}
        x = np.arange(len(lengths)) + (number - len(policies) / 2) * 0.025
        y, low, high = (
            np.array([float(by_length[n][c]) if n in by_length else np.nan for n in lengths])
            for c in ("accuracy", "low", "high")
        )
        style = {"linewidth": 2.5, "zorder": 5} if policy == "learned" else {"linewidth": 1}
        axes.errorbar(x, y, yerr=(y - low, high - y), marker="o", markersize=4, capsize=2, label=policy, **style)
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set(xlabel="patches of a slide", ylabel=f"accuracy at K = {rows[0]['k']}", ylim=(0, 1.03))
    axes.legend(frameon=False, fontsize=7, ncols=3)


def _k_sweep(axes: Any, rows: list[Row]) -> None:
    for length in dict.fromkeys(row["length"] for row in rows):
        part = [row for row in rows if row["length"] == length]
        k = [int(row["k"]) for row in part]
        y, low, high = (np.array([float(row[name]) for row in part]) for name in ("accuracy", "low", "high"))
        axes.errorbar(k, y, yerr=(y - low, high - y), marker="o", markersize=4, capsize=2, label=f"N = {length}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="K", ylabel="accuracy, learned selection", ylim=(0, 1.03))
    axes.legend(frameon=False, fontsize=8)


def _ablations(axes: Any, rows: list[Row]) -> None:
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    for number, length in enumerate(lengths):
        for place, arm in enumerate(arms):
            y = [float(row["accuracy"]) for row in rows if (row["arm"], row["length"]) == (arm, length)]
            x = np.full(len(y), place + (number - (len(lengths) - 1) / 2) * 0.2)
            axes.plot(x, y, "o", markersize=4, color=f"C{number}", label=f"N = {length}" if place == 0 else None)
            axes.plot(x[0] + np.array([-0.08, 0.08]), [np.mean(y)] * 2, color=f"C{number}", linewidth=2)
    axes.axhline(0.25, **CHANCE_STYLE)
    axes.set_xticks(range(len(arms)), [arm.replace(", ", ",\n") for arm in arms], fontsize=6)
    tuned = next((row["arm"] for row in rows if row["schedules"] == "tuned for this arm"), None)
    note = "" if tuned is None else f"schedules of tau and K tuned for «{tuned}»"
    axes.set(ylabel="accuracy by Hard Top-K, one dot a seed", ylim=(0, 1.03))
    axes.set_xlabel(note, fontsize=7)
    axes.legend(frameon=False, fontsize=8)


def _soft_hard(axes: Any, rows: list[Row]) -> None:
    x = np.arange(len(rows))
    for offset, name in ((-0.2, "hard_accuracy"), (0.2, "soft_accuracy")):
        axes.bar(x + offset, [float(row[name]) for row in rows], 0.38, label=name.replace("_", " "))
    axes.set_xticks(x, [row["length"] for row in rows])
    axes.set(xlabel="patches of a slide", ylabel="accuracy", ylim=(0, 1.03))
    axes.legend(frameon=False, fontsize=8)
