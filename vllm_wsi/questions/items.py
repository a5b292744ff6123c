"""Questions about slides, as training, studies and benchmarks hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm_wsi.errors import WsiError
from vllm_wsi.slides import FeatureFile

SLIDE_MARK = "<image>"
"""Where a question's text names its slide, as SlideInstruct and LLaVA write it."""

MAX_PROBLEMS = 10


class SlideSource(Protocol):
    """Something that opens as a feature file."""

    @property
    def name(self) -> str: ...

    def open(self) -> FeatureFile: ...


@dataclass(frozen=True)
class SlideItem:
    """A conversation about slides."""

    where: str  # file and row, as errors name it
    slides: tuple[SlideSource, ...]  # in the order of their marks, all in the first question
    turns: tuple[tuple[str, str], ...]  # (question, answer)
    # The possible answers of a question of choice and what they mean: letter -> text, «Yes.» -> «yes», or each name ->
    # itself. They begin with different tokens.
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def question(self) -> str:
        return self.turns[0][0]

    @property
    def answer(self) -> str:
        return self.turns[0][1]


class QuestionError(WsiError):
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
