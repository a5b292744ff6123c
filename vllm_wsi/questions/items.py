"""Questions about slides: SlideInstruct conversations (JSON) and SlideBench multiple choice (CSV)."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vllm_wsi.slides import FeatureFile, SlideError, open_features
from vllm_wsi.slides.formats.dispatch import IMAGE_SUFFIXES
from vllm_wsi.slides.identity import is_store
from vllm_wsi.slides.slide_names import names_of_slide, slide_name, walk_features

SLIDE_MARK = "<image>"
"""Where a question's text names its slide, as SlideInstruct and LLaVA write it."""

MAX_PROBLEMS = 10


class NoFeaturesError(SlideError):
    """A slide that no feature file is there for."""


class SlideSource(Protocol):
    """Something that opens as a feature file."""

    @property
    def name(self) -> str: ...

    def open(self) -> FeatureFile: ...


@dataclass(frozen=True)
class FeaturePath:
    """A feature file on disk."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def open(self) -> FeatureFile:
        return open_features(self.path)


@dataclass(frozen=True)
class SlideItem:
    """A conversation about slides."""

    where: str  # file and row, as errors name it
    slides: tuple[SlideSource, ...]  # in the order of their marks, all in the first question
    turns: tuple[tuple[str, str], ...]  # (question, answer)
    options: Mapping[str, str] = field(
        default_factory=dict
    )  # letter -> text, where the first question is one of choice

    @property
    def question(self) -> str:
        return self.turns[0][0]

    @property
    def answer(self) -> str:
        return self.turns[0][1]


class QuestionError(ValueError):
    """Bad items of question files, each with its row; `items` are the good ones beside them."""

    def __init__(self, problems: Sequence[str], items: Sequence[SlideItem] = ()) -> None:
        more = [f"... and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        super().__init__("\n".join([*problems[:MAX_PROBLEMS], *more]))
        self.problems, self.items = problems, items


def multiple_choice(where: str, slide: SlideSource, stem: str, options: Mapping[str, str], letter: str) -> SlideItem:
    """A question as SlideChat asks it: the stem, then one line for each option."""
    return SlideItem(where, (slide,), ((f"{SLIDE_MARK}\n{choice_text(stem, options)}", letter),), dict(options))


def choice_text(stem: str, options: Mapping[str, str]) -> str:
    """What SlideChat asks beside the slide: the stem, then one line for each option."""
    return "\n".join([stem, *(f"{key}. {text}" for key, text in options.items())])


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


class FeatureFinder:
    """Feature files below a directory, by relative path or by name; hidden folders are not searched by name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._by_name: dict[str, list[Path]] = {}
        self._by_image: dict[str, list[Path]] = {}  # where the features' name is that of an image: a.ome.h5, a.svs.h5
        for path in walk_features(root):
            name, *shorter = names_of_slide(slide_name(path.name))
            self._by_name.setdefault(name, []).append(path)
            for one in shorter:
                self._by_image.setdefault(one, []).append(path)

    def __call__(self, name: str) -> FeaturePath:
        path = self._root / name
        if not (path.is_file() or is_store(path)) or path.suffix.lower() in IMAGE_SUFFIXES:
            files = self._files(slide_name(Path(name).name))
            files = [file for file in files if file.parent == path.parent] or files
            if not files:
                raise NoFeaturesError(
                    f"found no features of slide {name!r} in {self._root.name}, wanted a feature file"
                )
            if len(files) > 1:
                found = ", ".join(str(file.relative_to(self._root)) for file in files)
                raise SlideError(f"found several files of slide {name!r} ({found}), wanted one")
            path = files[0]
        return FeaturePath(path)

    def _files(self, slide: str) -> list[Path]:
        names = list(names_of_slide(slide))
        found = [*(self._by_name.get(name) for name in names), *(self._by_image.get(name) for name in names)]
        return next((files for files in found if files), [])

    def names_of_case(self, case: str) -> list[str]:
        """Names of the slides of a case, or of a slide without its UUID: those that begin with the barcode."""
        return sorted(name for name in self._by_name if name.startswith((f"{case}-", f"{case}.")))


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
