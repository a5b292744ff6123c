"""The question that a `QuestionScorer` hears, of a conversation: training and serving must agree on it.

It is the text of the last user turn that has any. What was said before, and a system prompt, is not heard: a follow-up
that is to choose other patches must name what it asks for.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from vllm_wsi.questions.items import SLIDE_MARK

from .config import SLIDE_TOKEN

NO_TOKEN = -1
"""Stands where a question of a batch has no token."""
MAX_CHARACTERS, MAX_TOKENS = 8192, 512
"""Of a question; what follows is not heard."""


def question_text(pieces: Iterable[str]) -> str:
    """The question of one user turn.

    Args:
        pieces: its texts, in their order, without its slides.
    """
    lines = [piece.replace(SLIDE_TOKEN, "").replace(SLIDE_MARK, "").strip() for piece in pieces]
    return "\n".join(line for line in lines if line)[:MAX_CHARACTERS].strip()


def question_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a question; [] of an empty one."""
    return tokenizer.encode(text, add_special_tokens=False)[:MAX_TOKENS]
