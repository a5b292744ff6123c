"""Questions about invasive carcinoma on a slide whose share of tumour is known, in several wordings, with answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np

from vllm_wsi.questions.items import SLIDE_MARK, SlideItem, SlideSource, choice_text

LETTERS = "ABCD"

Kind = Literal["presence", "presence_sentence", "presence_choice", "share", "share_sentence", "share_choice"]
"""Presence: is there tumour? Share: how much of the slide is tumour (`SHARE_CLASSES`)?

Plain: answered by one word or a share. `_sentence`: by a whole sentence. `_choice`: by the letter of an option.
"""

KINDS: tuple[Kind, ...] = get_args(Kind)

PRESENCE = {True: "invasive carcinoma", False: "no invasive carcinoma"}

SHARE_CLASSES = ("none", "under 5 %", "5 to 20 %", "over 20 %")
"""Shares of tumour that a question tells apart; 5 % belongs to the third class, and 20 % too."""

# For each kind, the last wording is asked only where unseen wordings are wanted.
STEMS: dict[Kind, tuple[str, ...]] = {
    "presence": (
        "Is there invasive carcinoma on this slide? Answer yes or no.",
        "Does this slide show invasive carcinoma? Answer yes or no.",
        "Yes or no: is invasive ductal carcinoma present?",
        "Can invasive breast cancer be seen here? Answer yes or no.",
        "Answer yes or no. Does any of this tissue hold invasive carcinoma?",
    ),
    "presence_sentence": (
        "Is there invasive carcinoma on this slide? Answer in a sentence.",
        "Does this slide show invasive carcinoma? Answer in one sentence.",
        "Say in a sentence whether invasive ductal carcinoma is present.",
        "Can invasive breast cancer be seen here? Write a sentence.",
        "Write one sentence: does any of this tissue hold invasive carcinoma?",
    ),
    "presence_choice": (
        "What does this slide show?",
        "Which of these is right for this slide?",
        "Which of these findings does the tissue have?",
        "Choose the finding of this slide.",
    ),
    "share": (
        f"How much of this slide is invasive carcinoma: {', '.join(SHARE_CLASSES[:-1])} or {SHARE_CLASSES[-1]}?",
        f"What share of the tissue is tumour ({', '.join(SHARE_CLASSES)})?",
        f"Estimate the share of invasive carcinoma. Answer {', '.join(SHARE_CLASSES[:-1])} or {SHARE_CLASSES[-1]}.",
        f"Which part of this slide is tumour: {', '.join(SHARE_CLASSES[:-1])}, or {SHARE_CLASSES[-1]}?",
    ),
    "share_sentence": (
        "How much of this slide is invasive carcinoma? Answer in a sentence.",
        "What share of the tissue is tumour? Answer in one sentence.",
        "Say in a sentence how much invasive carcinoma there is.",
        "Which part of this slide is tumour? Write a sentence.",
    ),
    "share_choice": (
        "How much of this slide is invasive carcinoma?",
        "What share of the tissue is tumour?",
        "Which of these is the share of invasive carcinoma on this slide?",
        "Which part of this slide is tumour?",
    ),
}

SHARE_SENTENCES = (
    "None of this slide is invasive carcinoma.",
    "Under 5 % of this slide is invasive carcinoma.",
    "5 to 20 % of this slide is invasive carcinoma.",
    "Over 20 % of this slide is invasive carcinoma.",
)
PRESENCE_SENTENCES = {
    True: "Yes, this slide shows invasive carcinoma.",
    False: "No, this slide shows no invasive carcinoma.",
}


class TissueQuestion(NamedTuple):
    """One question and its right answer."""

    kind: str
    text: str  # as a client asks it beside the slide, options included
    options: Mapping[str, str]  # label -> text of the option; an answer that names another one is wrong
    answers: Mapping[str, str]  # label -> the whole answer that training teaches where that option is right
    gold: str  # the right label

    @property
    def answer(self) -> str:
        """The right answer, as training teaches it."""
        return self.answers[self.gold]

    @property
    def texts(self) -> dict[str, str]:
        """Whole answer -> text of its option, as `SlideItem.options` has it."""
        return {answer: self.options[label] for label, answer in self.answers.items()}


@dataclass(frozen=True)
class TissueItem(SlideItem):
    """A conversation about one slide, of one question, that knows its question."""

    asked: TissueQuestion = field(kw_only=True)


def share_class(share: float) -> int:
    """The place in `SHARE_CLASSES` of a share of tumour in [0, 1]."""
    return int(share > 0) + int(share >= 0.05) + int(share > 0.2)


def ask(
    kind: Kind, share: float, rng: np.random.Generator, unseen_wording: bool = False, num_wordings: int | None = None
) -> TissueQuestion:
    """A question of a kind about a slide.

    Args:
        share: of the slide's patches that are tumour, in [0, 1].
        rng: draws the wording and the order of the options.
        unseen_wording: asks in the wording that is never drawn else.
        num_wordings: draws among the first so many; None: among all others.
    """
    stems = STEMS[kind]
    stem = stems[-1] if unseen_wording else stems[rng.integers(min(len(stems) - 1, num_wordings or len(stems)))]
    has_tumour, of_class = share > 0, share_class(share)
    if kind == "presence_choice":
        return _by_letter(kind, stem, list(PRESENCE.values()), int(not has_tumour), rng)
    if kind == "share_choice":
        return _by_letter(kind, stem, SHARE_CLASSES, of_class, rng)
    if kind in ("share", "share_sentence"):
        options = dict(zip(LETTERS, SHARE_CLASSES, strict=True))
        said = SHARE_SENTENCES if kind == "share_sentence" else SHARE_CLASSES
        return TissueQuestion(kind, stem, options, dict(zip(LETTERS, said, strict=True)), LETTERS[of_class])
    said_of = PRESENCE_SENTENCES if kind == "presence_sentence" else {True: "Yes.", False: "No."}
    answers = {"A": said_of[True], "B": said_of[False]}
    return TissueQuestion(kind, stem, {"A": "yes", "B": "no"}, answers, "A" if has_tumour else "B")


def _by_letter(kind: str, stem: str, texts: Sequence[str], right: int, rng: np.random.Generator) -> TissueQuestion:
    """Options in a random order, so that each letter is as likely."""
    order = rng.permutation(len(texts))
    letters = LETTERS[: len(texts)]
    options = {letter: texts[place] for letter, place in zip(letters, order, strict=True)}
    gold = letters[int(np.flatnonzero(order == right)[0])]
    return TissueQuestion(kind, choice_text(stem, options), options, {letter: letter for letter in letters}, gold)


def tissue_item(where: str, slide: SlideSource, asked: TissueQuestion) -> TissueItem:
    """The question as a conversation."""
    return TissueItem(where, (slide,), ((f"{SLIDE_MARK}\n{asked.text}", asked.answer),), asked.texts, asked=asked)
