"""A question that is ready to be asked, and the row that its answer, an error or a missing slide becomes.

All ways of asking (a server, vLLM in this process, batch files) get a `PreparedQuestion` or a row from
`Evaluation.prepare`, and make their rows here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .chat_request import Answer, Mode, needs_structure, read_answer, request_body
from .results import Row, Status
from .slide_files import SlideFile
from .slide_trust import SlideTrust, confidence
from .tasks import Question

BAD_RESPONSE = (KeyError, TypeError, ValueError, IndexError)
"""What `read_answer` raises on the JSON of a server that does not answer as OpenAI's does."""


@dataclass(frozen=True)
class PreparedQuestion:
    """A question whose slide has usable features."""

    question: Question
    mode: Mode
    slide: SlideFile
    url: str | None  # that the request names; None: no slide is shown
    # Whether the patches are the scorer's choice. Of a baseline's 32 patches, chosen otherwise, the calibration knows
    # nothing: their scores are not those of the whole slide.
    is_selected: bool

    def request(self, model: str, max_tokens: int) -> dict[str, Any]:
        """The body of the one request that is made where no second one can follow.

        Labels of two characters are asked for by structured outputs, all others by their log-probabilities alone.
        """
        structured = needs_structure(self.question)
        return request_body(self.question, self.url, self.mode, model, max_tokens, structured)

    def responded(self, response: Mapping[str, Any]) -> Row:
        """The row of the response to `request`; an error where it cannot be read.

        Args:
            response: of a chat completion, with the fields of `SlideTrust` in "slide_trust" where they are known.
        """
        try:
            answer = read_answer(self.question, self.mode, response, needs_structure(self.question))
        except BAD_RESPONSE as error:
            return self.failed(error_text(error))
        return self.answered(answer, SlideTrust.of(response.get("slide_trust")))

    def answered(self, answer: Answer, trust: SlideTrust, seconds: float | None = None) -> Row:
        """The row of an answer.

        Args:
            trust: what is said of the slide that the request names.
            seconds: from the question to its answer, with retries; None where it was not asked alone.
        """
        score = answer.score
        return self._row(
            "answered",
            label=score.label,
            rule=score.rule,
            correct=score.correct,
            other=dict(score.other),
            output=answer.output,
            logprobs=None if answer.logprobs is None else dict(answer.logprobs),
            confidence=confidence(score.label, answer.logprobs, trust.answer_temperature),
            sufficiency=trust.sufficiency if self.is_selected else None,
            in_distribution=trust.in_distribution if self.is_selected else None,
            finish_reason=answer.finish_reason,
            seconds=seconds,
        )

    def failed(self, reason: str, seconds: float | None = None) -> Row:
        """The row of a question that got no answer."""
        return self._row("error", error=reason, seconds=seconds)

    def _row(self, status: Status, **values: Any) -> Row:
        slide = self.slide
        said = {"num_patches": slide.num_patches, "encoder": slide.encoder, "slide_digest": slide.digest}
        return _row(self.question, status, **said, **values)


def missing_row(question: Question, reason: str) -> Row:
    """The row of a question whose slide has no usable features."""
    return _row(question, "missing", error=reason)


def error_text(error: Exception) -> str:
    """An exception as rows record it."""
    return f"{type(error).__name__}: {error}"


def _row(question: Question, status: Status, **values: Any) -> Row:
    return Row(
        key=question.key,
        slide=question.slide,
        status=status,
        gold=question.gold,
        categories=dict(question.categories),
        options=len(question.options),
        **values,
    )
