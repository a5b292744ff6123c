"""Question files about slides: SlideInstruct conversations (JSON) and SlideBench multiple choice (CSV)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_wsi.errors import SlideError

from .finder import FeatureFinder, FeaturePath
from .items import SLIDE_MARK, QuestionError, SlideItem, multiple_choice
from .question_rows import csv_rows, json_rows, parse_choice_row


def read_questions(path: str | Path, features: str | Path) -> list[SlideItem]:
    """Reads a question file whose slides lie below a directory of feature files.

    Args:
        path: `.json` as SlideInstruct (`conversations` of human and gpt, the feature file in `image`), or `.csv` as
            SlideBench (Slide, Question, A .. D, Answer).
        features: directory; a slide is found by its path there, or by its name with any suffix of feature files.

    Raises:
        QuestionError: names every bad item by file and row.
    """
    path, features = Path(path), Path(features)
    if not features.is_dir():
        raise QuestionError([f"{features}: found no directory, wanted one of feature files"])
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {".json": json_rows, ".csv": csv_rows}
    parsers = {".json": _parse_conversation, ".csv": _parse_choice}
    if path.suffix not in readers:
        raise QuestionError([f"{path}: found the suffix {path.suffix!r}, wanted one of {', '.join(readers)}"])
    items, problems = [], []
    find = FeatureFinder(features)
    for where, row in readers[path.suffix](path):
        try:
            items.append(parsers[path.suffix](where, row, find))
        except (SlideError, KeyError, TypeError, ValueError) as error:
            reason = f"found no {error}" if isinstance(error, KeyError) else str(error)
            problems.append(f"{where}: {reason}")
    if problems:
        raise QuestionError(problems, items)
    if not items:
        raise QuestionError([f"{path}: found no question, wanted at least one"])
    return items


def _parse_conversation(where: str, row: Any, find: Callable[[str], FeaturePath]) -> SlideItem:
    if not isinstance(row, dict):
        raise ValueError(f"found a {type(row).__name__}, wanted an object with image and conversations")
    image = row["image"]
    names = [image] if isinstance(image, str) else list(image)
    if not names:
        raise ValueError("image: found no slide, wanted at least one")
    said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    if [who for who, _ in said] != ["human", "gpt"] * (len(said) // 2) or not said:
        raise ValueError("conversations: found other speakers, wanted human and gpt in turns")
    if any(not isinstance(text, str) or not text.strip() for _, text in said):
        raise ValueError("conversations: found an empty turn, wanted text")
    texts = [text for _, text in said]
    marks = [text.count(SLIDE_MARK) for text in texts]
    if marks[0] == 0:  # some releases leave the mark out
        texts[0], marks[0] = SLIDE_MARK * len(names) + "\n" + texts[0], len(names)
    if marks[0] != len(names) or any(marks[1:]):
        raise ValueError(f"{SLIDE_MARK}: found {marks} in the turns, wanted {len(names)} in the first alone")
    turns = tuple(zip(texts[::2], (text.strip() for text in texts[1::2]), strict=True))
    return SlideItem(where, tuple(find(name) for name in names), turns)


def _parse_choice(where: str, row: Mapping[str, str | None], find: Callable[[str], FeaturePath]) -> SlideItem:
    slide, stem, options, letter = parse_choice_row(row)
    return multiple_choice(where, find(slide), stem, options, letter)
