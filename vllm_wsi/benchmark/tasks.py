"""Benchmarks of whole-slide questions. A task reads rows of its file; asking and scoring are the same for all tasks.

To add a task, write a function that makes a `Question` of a row, and name it in `TASKS`. The schemas are those of the
files: SlideBench (SlideChat, arXiv 2410.11761), WSI-VQA (arXiv 2407.05603), WSI-Bench (WSI-LLaVA, arXiv 2412.02141),
MultiPathQA ("Navigating Gigapixel Pathology Images with Large Multimodal Models", 2025).
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from vllm_wsi.files import IMAGE_SUFFIXES
from vllm_wsi.questions.items import QuestionError, choice_text
from vllm_wsi.questions.question_rows import cell, csv_rows, json_rows, parse_choice_row

from .parsing import normalise, parse_label

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """One row of a benchmark."""

    key: str  # of the row, unique in its file
    slide: str  # as the file names it: a feature file's path or name without suffix, or a case
    text: str  # beside the slide, options included
    options: Mapping[str, str]  # label -> text; empty: an open question
    gold: str  # the right label, or the answer of an open question
    categories: Mapping[str, str] = field(default_factory=dict)  # name of a grouping -> group


@dataclass(frozen=True)
class Score:
    """How an answer was read, and whether it is right."""

    label: str | None  # that the answer names; None for open questions, and where the answer names none
    rule: str  # by which the label was found: one of `parsing`, "logprobs", "structured", "open" or "none"
    correct: bool
    other: Mapping[str, float] = field(default_factory=dict)  # further measures, in [0, 1]


def to_messages(question: Question, slide_url: str | None) -> list[dict[str, Any]]:
    """The chat messages of a question: one user turn, the slide before the text; without a URL, the text alone."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
    if slide_url is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": slide_url}})
    return [{"role": "user", "content": parts}]


def score(question: Question, output: str) -> Score:
    """Scores a written answer.

    Multiple choice: `parsing` reads the label. `nearest_choice` is WSI-VQA's own measure, as its answers are the texts
    of options: 1 where no option is more similar to the answer, by difflib's quick_ratio, than the right one is.
    Open: `correct` where the normalised words are equal; `token_f1` is the F1 of the two bags of words.
    """
    if not question.options:
        found, wanted = normalise(output).split(), normalise(question.gold).split()
        both = sum((Counter(found) & Counter(wanted)).values())
        f1 = 2 * both / (len(found) + len(wanted)) if found or wanted else 0.0
        return Score(None, "open", found == wanted, {"token_f1": f1})
    parsed = parse_label(output, question.options)
    ratios = {
        label: difflib.SequenceMatcher(None, output, text).quick_ratio() for label, text in question.options.items()
    }
    nearest = float(ratios[question.gold] >= max(ratios.values()))
    return Score(parsed.label, parsed.rule, parsed.label == question.gold, {"nearest_choice": nearest})


def read_task(name: str, path: str | Path, columns: Mapping[str, str] | None = None) -> list[Question]:
    """All questions of a benchmark's file, in its order.

    Args:
        name: one of `TASKS`.
        path: the file as its authors publish it.
        columns: of `csv` alone: "slide", "question", "answer", and optionally "A" .. "H", "key", "category" -> the
            file's column; what is not named has SlideBench's name.

    Raises:
        QuestionError: names every bad row, or the file, or an unknown task.
    """
    path = Path(path)
    if name not in TASKS:
        raise QuestionError([f"task: found {name!r}, wanted one of {', '.join(TASKS)}"])
    if columns and name != "csv":
        raise QuestionError([f"columns: found some for the task {name}, wanted them for csv alone"])
    reader, parse = TASKS[name]
    questions: list[Question] = []
    problems = []
    seen: Counter[str] = Counter()
    for number, (where, row) in enumerate(reader(path)):
        try:
            found = parse(row if isinstance(row, dict) else {}, number, columns or {})
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{where}: {f'found no {error}' if isinstance(error, KeyError) else error}")
            continue
        seen[found.key] += 1
        if seen[found.key] > 1:  # public files repeat ids
            found = Question(**{**vars(found), "key": f"{found.key}#{seen[found.key]}"})
        questions.append(found)
    if problems:
        raise QuestionError(problems)
    if not questions:
        raise QuestionError([f"{path}: found no question, wanted at least one"])
    return questions


def _slidebench(*names: str) -> Callable[[dict, int, Mapping[str, str]], Question]:
    def parse(row: dict, number: int, columns: Mapping[str, str]) -> Question:
        slide, stem, options, letter = parse_choice_row(row)
        categories = {name: str(row[name]).strip() for name in names if (row.get(name) or "").strip()}
        key = (row.get("ID") or "").strip() or str(number)
        return Question(key, _slide_name(slide), choice_text(stem, options), options, letter, categories)

    return parse


def _csv(row: dict, number: int, columns: Mapping[str, str]) -> Question:
    known = {"slide": "Slide", "question": "Question", "answer": "Answer", "key": "ID", "category": "Category"}
    known |= {letter: letter for letter in LETTERS[:8]}
    if unknown := set(columns) - set(known):
        raise ValueError(f"columns: found {', '.join(sorted(unknown))}, wanted some of {', '.join(known)}")
    for column in columns.values():
        if column not in row:
            raise KeyError(column)
    names = {**known, **columns}
    values = {names_to: row.get(names[role]) for role, names_to in known.items()}
    if any(values[letter] for letter in LETTERS[:8]):
        return _slidebench("Category")(values, number, {})
    slide, text, gold = (cell(values, name) for name in ("Slide", "Question", "Answer"))
    categories = {"Category": str(values["Category"])} if values["Category"] else {}
    return Question(values["ID"] or str(number), _slide_name(slide), text, {}, gold, categories)


def _wsi_vqa(row: dict, number: int, columns: Mapping[str, str]) -> Question:
    case, stem, gold = (_text(row, name) for name in ("Id", "Question", "Answer"))
    choices = row.get("Choice") or []
    part = {"Part": "closed" if choices else "open"}
    if not choices:
        return Question(str(number), case, stem, {}, gold, part)
    options = {LETTERS[i]: str(text).strip() for i, text in enumerate(choices)}
    return Question(str(number), case, choice_text(stem, options), options, _label_of(gold, options), part)


def _wsi_bench(row: dict, number: int, columns: Mapping[str, str]) -> Question:
    image = row["image"] if isinstance(row["image"], str) else row["image"][0]
    said = {turn["from"]: str(turn["value"]) for turn in row["conversations"][:2]}
    text, gold = said["human"].replace("<image>", "").strip(), said["gpt"].strip()
    slide = _slide_name(image.removesuffix(".pt"))
    categories = {name: str(row[name]) for name in ("task", "category", "question_type") if row.get(name)}
    options = _inline_options(text)
    letter = re.match(r"\W*([A-H])(?![\w-])", gold)
    if letter and letter[1] in options:
        return Question(str(row.get("id", number)), slide, text, options, letter[1], {"Part": "closed", **categories})
    if re.fullmatch(r"\W*[A-H]\W*", gold):
        known = ", ".join(options) or "none"
        raise ValueError(f"answer: found {gold!r}, wanted one of the question's options ({known})")
    return Question(str(row.get("id", number)), slide, text, {}, gold, {"Part": "open", **categories})


def _inline_options(text: str) -> dict[str, str]:
    """label -> text of the options that end a question: the longest run of A, B, .. with one delimiter; {} without one.

    Of runs of one length it is the last. A letter out of order is part of a text, as the H of "H. pylori", and so is
    one with no text between it and the label before, as the E of "D. E. coli".
    """
    marks = list(re.finditer(r"(?<!\S)\(?([A-H])([).])\s*", text))
    longest: dict[str, str] = {}
    for first in [mark for mark in marks if mark[1] == "A"]:
        run = [first]
        for mark in marks:
            before = text[run[-1].end() : mark.start()].strip(" \n,;")
            if before and (mark[1], mark[2]) == (LETTERS[len(run)], first[2]):
                run.append(mark)
        ends = [*(mark.start() for mark in run[1:]), len(text)]
        options = {mark[1]: text[mark.end() : end].strip(" \n,;") for mark, end in zip(run, ends, strict=True)}
        if len(options) >= max(2, len(longest)) and all(options.values()):
            longest = options
    return longest


def _multipathqa(row: dict, number: int, columns: Mapping[str, str]) -> Question:
    """Options are numbered from 1, as in its authors' prompts; without options the answer is a grade from 0 to 5.

    Prompts are templates of `str.format`: they hold `{options}`, and double braces where a single brace is meant.
    """
    slide, prompt, gold = (cell(row, name) for name in ("image_path", "prompt", "answer"))
    listed = (row.get("options") or "").strip()
    if listed:
        try:
            texts = json.loads(listed)
        except ValueError:
            texts = ast.literal_eval(listed)
        if not isinstance(texts, list):
            raise ValueError(f"options: found {type(texts).__name__}, wanted a list")
        options = {str(i): str(text).strip() for i, text in enumerate(texts, 1)}
        block = "\n".join(f"{label}. {text}" for label, text in options.items())
        text = prompt.replace("{options}", block) if "{options}" in prompt else choice_text(prompt, options)
    else:
        options, text = {str(i): f"grade {i}" for i in range(6)}, prompt
    text = text.replace("{{", "{").replace("}}", "}")
    gold = gold.removesuffix(".0")
    label = gold if gold in options else _label_of(gold, options)
    name = cell(row, "benchmark_name")
    key = (row.get("benchmark_id") or "").strip()
    return Question(f"{name}/{key or number}", _slide_name(slide), text, options, label, {"Benchmark": name})


def _label_of(gold: str, options: Mapping[str, str]) -> str:
    """The label of the option whose text is the answer."""
    same = [label for label, text in options.items() if text == gold]
    same = same or [label for label, text in options.items() if normalise(text) == normalise(gold)]
    if not same:
        raise ValueError(f"answer: found {gold!r}, wanted one of {', '.join(options.values())}")
    return same[0]


def _text(row: dict, name: str) -> str:
    return cell({name: None if row[name] is None else str(row[name])}, name)


def _slide_name(name: str) -> str:
    """Without the suffix of a slide image, which feature files do not have."""
    path = PurePath(name)
    return name.removesuffix(path.suffix) if path.suffix.lower() in IMAGE_SUFFIXES else name


Reader = Callable[[Path], Iterator[tuple[str, Any]]]
TASKS: dict[str, tuple[Reader, Callable[[dict, int, Mapping[str, str]], Question]]] = {
    "slidebench-tcga": (csv_rows, _slidebench("Broad Category", "Narrow Category", "Tumor")),
    "slidebench-bcnb": (csv_rows, _slidebench("Task")),
    "wsi-vqa": (json_rows, _wsi_vqa),
    "wsi-bench": (json_rows, _wsi_bench),
    "multipathqa": (csv_rows, _multipathqa),
    "csv": (csv_rows, _csv),
}
