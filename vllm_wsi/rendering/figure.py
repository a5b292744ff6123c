"""Figures of matplotlib: one look for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_wsi.errors import needs_extra


def save_figure(path: Path, draw: Callable[[Any], None]) -> Path:
    """Writes a PNG file of one pair of axes; returns its path.

    Args:
        draw: draws on the axes that it is given.

    Raises:
        SetupError: matplotlib is not installed.
    """
    with needs_extra("study"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
