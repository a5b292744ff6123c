"""Numbers as the study's tables show them."""

from __future__ import annotations


def rounded(value: float) -> float:
    """A share: four digits behind the point."""
    return round(float(value), 4)


def significant(value: float) -> float:
    """A p-value or a small change: three significant digits, so that none becomes 0."""
    return float(f"{value:.3g}")
