"""Conversations as token ids, exactly as vLLM renders the same conversation of an OpenAI client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from vllm_wsi.errors import CheckpointError
from vllm_wsi.questions.items import SLIDE_MARK, SlideItem

from .config import SLIDE_TOKEN

IGNORED = -100
"""Label of a token that is not in the loss."""


class EncodedChat(NamedTuple):
    """Token ids with one slide token for each slide, and their labels."""

    ids: list[int]
    labels: list[int]


def last_answer(labels: list[int]) -> list[int]:
    """Labels of the last answer of a conversation alone."""
    end = max((place for place, label in enumerate(labels) if label != IGNORED), default=-1)
    begin = end
    while begin > 0 and labels[begin - 1] != IGNORED:
        begin -= 1
    return [IGNORED] * begin + labels[begin:]


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's chat template puts the slide token where a message's parts hold an image."""
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]
    try:
        rendered = tokenizer.apply_chat_template(probe, add_generation_prompt=False, tokenize=False)
    except Exception:  # a template that expects text may fail in any way on a list of parts
        return False
    return rendered.count(SLIDE_TOKEN) == 1


class ChatRenderer:
    """Renders items by a checkpoint's chat template.

    Raises:
        CheckpointError: the tokenizer has no chat template or no slide token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise CheckpointError(f"{tokenizer.name_or_path}: found no chat template, wanted one beside the tokenizer")
        ids = tokenizer.encode(SLIDE_TOKEN, add_special_tokens=False)
        if len(ids) != 1:
            raise CheckpointError(f"{tokenizer.name_or_path}: found {SLIDE_TOKEN} as {ids}, wanted one special token")
        self.slide_token_id: int = ids[0]
        self._takes_parts = takes_parts(tokenizer)

    def question(self, item: SlideItem) -> list[int]:
        """Ids of the first question, up to where the answer begins."""
        return self._ids(self._render([self._user(item.question)], True))

    def conversation(self, item: SlideItem) -> EncodedChat:
        """Ids of all turns; the answers and their end-of-turn tokens alone are labelled."""
        messages: list[dict[str, Any]] = []
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for question, answer in item.turns:
            messages.append(self._user(question))
            prompt = self._render(messages, True)
            # Where a template takes parts, vLLM passes earlier answers as parts too.
            content = [{"type": "text", "text": answer}] if self._takes_parts else answer
            messages.append({"role": "assistant", "content": content})
            whole = self._render(messages, False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise CheckpointError(f"{item.where}: the chat template changes earlier turns, wanted one that appends")
            asked, said = self._ids(prompt[len(done) :]), self._ids(whole[len(prompt) :])
            end = said.index(self.tokenizer.eos_token_id) + 1 if self.tokenizer.eos_token_id in said else len(said)
            ids += asked + said
            labels += [IGNORED] * len(asked) + said[:end] + [IGNORED] * (len(said) - end)
            done = whole
        return EncodedChat(ids, labels)

    def end_of_turn(self) -> list[int]:
        """The tokens at which an answer ends: the tokenizer's end of sequence, and what the template writes there."""
        messages: list[dict[str, Any]] = [self._user("x")]
        prompt = self._render(messages, True)
        content = [{"type": "text", "text": "x"}] if self._takes_parts else "x"
        whole = self._render([*messages, {"role": "assistant", "content": content}], False)
        special = set(self.tokenizer.all_special_ids)
        after = [one for one in self._ids(whole.removeprefix(prompt)) if one in special]
        return sorted({*after[:1], self.tokenizer.eos_token_id} - {None})

    def first_ids(self, answers: Sequence[str]) -> list[int]:
        """The token that each of these answers begins with.

        Raises:
            ValueError: two of them begin with the same one.
        """
        first = [self._ids(answer)[0] for answer in answers]
        if len(set(first)) < len(first):
            raise ValueError(f"answers: found {', '.join(answers)}, wanted answers that differ in their first token")
        return first

    def _user(self, text: str) -> dict[str, Any]:
        pieces = [piece.strip("\n") for piece in text.split(SLIDE_MARK)]
        if not self._takes_parts:
            # Where a template takes text only, vLLM puts the placeholders before the text.
            marks = [SLIDE_TOKEN] * (len(pieces) - 1)
            return {"role": "user", "content": "\n".join([*marks, *(piece for piece in pieces if piece)])}
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(pieces):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": piece}] if piece else []
        return {"role": "user", "content": parts}

    def _render(self, messages: list[dict[str, Any]], ask: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
