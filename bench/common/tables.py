"""Tables of Markdown pages that benchmarks write: between `<!-- NAME -->` and `<!-- NAME end -->`."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, all of text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def interval(row: Mapping[str, str], estimate: str, low: str, high: str) -> str:
    """estimate [low, high], of a row's columns of these names"""
    shown = [f"{float(row[name]) + 0.0:.2f}" for name in (estimate, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left, all others to the right."""
    rule = "|".join(["", "---", *["--:"] * (len(head) - 1), ""])
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Puts each table between its marks.

    Raises:
        ValueError: the page has no such marks, or has them twice; nothing is written then.
    """
    text = page.read_text()
    for name, new in tables.items():
        mark, end = f"<!-- {name} -->\n", f"<!-- {name} end -->\n"
        written = (mark + new + end).replace("\\", r"\\")  # re.sub would take a backslash for an escape
        text, count = re.subn(f"{mark}.*?{end}", written, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page.name}: found {count} parts {mark.strip()}, wanted one")
    page.write_text(text)
