"""Rows of question files, and the columns of SlideBench."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .items import QuestionError


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of a JSON list; QuestionError where it is none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise QuestionError([f"{path}: found no JSON ({error}), wanted a list of conversations"]) from error
    if not isinstance(rows, list):
        raise QuestionError([f"{path}: found a {type(rows).__name__}, wanted a list of conversations"])
    for number, row in enumerate(rows):
        yield f"{path.name}, item {number}", row


def csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row by column name) of a CSV file, with or without a byte-order mark."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield f"{path.name}, line {reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise QuestionError(
                [f"{path.name}, behind line {reader.line_num}: found no CSV in UTF-8: {error}"]
            ) from error


class ChoiceRow(NamedTuple):
    """A row of SlideBench."""

    slide: str
    stem: str
    options: dict[str, str]  # letter -> text, without the empty ones
    letter: str  # of the right option


def parse_choice_row(row: Mapping[str, str | None]) -> ChoiceRow:
    """Reads Slide, Question, A .. H, Answer of a CSV row.

    Raises:
        KeyError: a column is not there.
        ValueError: nothing in a cell that must have text, fewer than two options, an answer that is none of them.
    """
    slide, stem, letter = (cell(row, name) for name in ("Slide", "Question", "Answer"))
    options = {key: text.strip() for key in string.ascii_uppercase[:8] if (text := row.get(key) or "").strip()}
    if len(options) < 2:
        raise ValueError(f"found {len(options)} options, wanted at least two in the columns A, B, ...")
    if letter not in options:
        raise ValueError(f"Answer: found {letter!r}, wanted one of {', '.join(options)}")
    return ChoiceRow(slide, stem, options, letter)


def cell(row: Mapping[str, str | None], name: str) -> str:
    """The text of a cell; KeyError without its column, ValueError without text."""
    value = (row[name] or "").strip()
    if not value:
        raise ValueError(f"{name}: found nothing, wanted text")
    return value
