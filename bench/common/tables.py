"""Tables of the README that benchmarks write: between `<!-- NAME -->` and `<!-- NAME end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


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
