"""The JSON of a chat completion about one question: the request's body, and what its answer is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .parsing import parse_label
from .tasks import Question, Score, score, to_messages

Mode = Literal["generate", "choice"]
TOP_LOGPROBS = 20
"""As many as OpenAI and vLLM give without further settings."""


@dataclass(frozen=True)
class Answer:
    """A server's answer, scored."""

    score: Score
    output: str
    logprobs: Mapping[str, float] | None  # label -> log-probability; None where none were asked for or found
    finish_reason: str | None


def request_body(
    question: Question, slide_url: str | None, mode: Mode, model: str, max_tokens: int, structured: bool = False
) -> dict[str, Any]:
    """The body of POST /v1/chat/completions; the answer is decoded greedily.

    Args:
        slide_url: None asks without a slide.
        mode: "generate" asks for a written answer. "choice" asks for one token and its log-probabilities, or, with
            `structured`, for one of the labels by vLLM's `structured_outputs` (vLLM 0.32 ignores the older name
            `guided_choice` without an error).
        max_tokens: of a written answer.
    """
    body: dict[str, Any] = {"model": model, "messages": to_messages(question, slide_url), "temperature": 0.0}
    if mode == "generate":
        return {**body, "max_tokens": max_tokens}
    if structured:
        return {**body, "max_tokens": 8, "structured_outputs": {"choice": list(question.options)}}
    return {**body, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}


def needs_structure(question: Question) -> bool:
    """Whether a label is longer than one character, so that its first token may not tell it from another label."""
    return any(len(label) > 1 for label in question.options)


def read_answer(question: Question, mode: Mode, response: Mapping[str, Any], structured: bool = False) -> Answer:
    """Scores the JSON of a chat completion.

    In mode "choice" the answer is the label with the largest probability among the first token's 20 likeliest, where
    "B" and " B" count together. It is the likeliest of all labels, as a label outside the 20 is less likely. Where none
    of the 20 is a label, the answer names none.

    Args:
        mode, structured: as the request was made.

    Raises:
        ValueError: the response holds no choice.
    """
    choices = response.get("choices") or []
    if not choices:
        raise ValueError("response: found no choices, wanted one")
    output, finish = choices[0]["message"].get("content") or "", choices[0].get("finish_reason")
    if mode == "generate":
        return Answer(score(question, output), output, None, finish)
    if structured:
        label = parse_label(output, question.options).label
        return Answer(Score(label, "structured", label == question.gold), output, None, finish)
    logprobs = _label_logprobs(question, choices[0])
    best = max(sorted(logprobs), key=lambda label: logprobs[label]) if logprobs else None
    rule = "logprobs" if logprobs else "none"
    return Answer(Score(best, rule, best == question.gold), output, logprobs or None, finish)


def _label_logprobs(question: Question, choice: Mapping[str, Any]) -> dict[str, float]:
    """Label -> log-probability at the answer's first token."""
    tokens = (choice.get("logprobs") or {}).get("content") or []
    found: dict[str, float] = {}
    for token in tokens[0].get("top_logprobs") or [] if tokens else []:
        label, logprob = str(token["token"]).strip(), float(token["logprob"])
        if label in question.options and math.isfinite(logprob):
            found[label] = _logaddexp(found[label], logprob) if label in found else logprob
    return found


def _logaddexp(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))
