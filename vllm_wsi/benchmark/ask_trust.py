"""Asks a server of ours what its checkpoint's calibration says of a slide, after it has answered about it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import openai

from .prepared import BAD_RESPONSE, error_text
from .slide_trust import SlideTrust
from .tasks import Question, to_messages

NO_ROUTE = (404, 405)
HEARS_NONE = "hears none"
"""In the HTTP 400 of a server whose scorer does not hear the question (`serving/service.py`)."""
TIMEOUT_S = 60
"""Of an attempt: the selection is in the server's memory, and an answer waits for this."""
MAX_FAILURES = 5
"""After so many failed requests on end, no more are made."""

logger = logging.getLogger(__name__)


class TrustRequests:
    """POST /v1/wsi/select beside the answers of one server.

    A server that has no such route, or says no sufficiency, is asked once and then no more. A request that fails leaves
    the fields of its row unknown, and is counted.

    Args:
        client: of the server; its retries are kept.
    """

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self._client = client.with_options(timeout=TIMEOUT_S)
        self._first = asyncio.Lock()  # so that one question alone finds out whether the server says these numbers
        self._says: bool | None = None  # None: not known yet
        self._hears: bool | None = None  # whether the scorer hears the question
        self._temperature: float | None = None
        self._failures_on_end, self.num_failed, self._first_error = 0, 0, ""

    async def of_slide(self, question: Question, url: str) -> SlideTrust:
        """What the server says of the very selection that a question was answered by.

        Args:
            url: of the slide, as the question named it.
        """
        first = await self._first_word(question, url)
        if first is not None:
            return first
        if self._says:
            return await self._ask(question, url)
        self.num_failed += bool(self._failures_on_end)
        return SlideTrust(answer_temperature=self._temperature)

    async def temperature(self, question: Question, url: str) -> float | None:
        """The checkpoint's temperature of answers, which any of its slides tells; None where it is not known."""
        first = await self._first_word(question, url)
        self.num_failed += first is None and self._temperature is None
        return self._temperature

    def log(self) -> None:
        """Says in the log what failed, if anything did."""
        if self.num_failed:
            logger.warning(
                "/v1/wsi/select: found no answer for %d questions (%s), wanted sufficiency and in_distribution; "
                "their answers are kept, without these", self.num_failed, self._first_error,
            )  # fmt: skip

    async def _first_word(self, question: Question, url: str) -> SlideTrust | None:
        """Asks where it is not known yet whether the server says these numbers; None where it is."""
        if self._says is None:
            async with self._first:
                if self._says is None:
                    return await self._ask(question, url)
        return None

    async def _ask(self, question: Question, url: str) -> SlideTrust:
        try:
            found = SlideTrust.of(await self._select(question, url))
        except (openai.OpenAIError, *BAD_RESPONSE) as error:
            if self._says is None and getattr(error, "status_code", None) in NO_ROUTE:
                return self._settle(SlideTrust(answer_temperature=1.0))
            return self._failed(error)
        self._failures_on_end = 0
        return found if self._says else self._settle(found)

    def _settle(self, found: SlideTrust) -> SlideTrust:
        """By the server's first word: a calibration is a checkpoint's, and so every slide has these numbers or none."""
        self._says, self._failures_on_end = found.sufficiency is not None, 0
        self._temperature = found.answer_temperature or 1.0
        return found._replace(answer_temperature=self._temperature)

    def _failed(self, error: Exception) -> SlideTrust:
        self.num_failed += 1
        self._failures_on_end += 1
        self._first_error = self._first_error or error_text(error)
        if self._failures_on_end >= MAX_FAILURES:
            self._says = False
        return SlideTrust(answer_temperature=self._temperature)

    async def _select(self, question: Question, url: str) -> object:
        """A scorer that hears the question selected for the text that the server put into the slide's URL.

        No route says of every URL whether it does (GET /v1/wsi/slide knows files alone): the first request finds out.
        """
        asked = url if self._hears is False else _with_question(question, url)
        try:
            return await self._post(asked)
        except openai.BadRequestError as error:
            if asked == url or HEARS_NONE not in str(error):
                raise
            self._hears = False
            return await self._post(url)

    async def _post(self, url: str) -> object:
        return await self._client.post("/wsi/select", body={"url": url}, cast_to=dict[str, Any])


def _with_question(question: Question, url: str) -> str:
    """The URL as the server's own hook makes it of this question's messages."""
    from vllm_wsi.serving.question_hook import with_question  # imports transformers, which takes seconds

    parts = with_question(to_messages(question, url))[0]["content"]
    return next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
