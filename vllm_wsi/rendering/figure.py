"""Figures of matplotlib: one look for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_wsi.errors import SetupError


def save_figure(path: Path, draw: Callable[[Any], None]) -> Path:
    """Writes a PNG file of one pair of axes; returns its path.

    Args:
        draw: draws on the axes that it is given.

    Raises:
        SetupError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SetupError('matplotlib: found no such package, wanted it: pip install "vllm-wsi[study]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
