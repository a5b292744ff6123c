"""Asks an OpenAI-compatible server the questions of an evaluation."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import openai

from vllm_wsi.errors import SetupError

from .ask_trust import TrustRequests
from .chat_request import Answer, Mode, needs_structure, read_answer, request_body
from .prepared import BAD_RESPONSE, PreparedQuestion, error_text
from .recorder import Recorder
from .results import Row
from .runner import Arm, Evaluation
from .slide_trust import SlideTrust
from .tasks import Question

FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
"""Errors that every further question would meet, too."""

MAX_UNREACHABLE_ROUNDS = 3
"""After so many rounds of all workers in which no question got a connection, a run ends."""


class Endpoint:
    """An OpenAI-compatible server. The openai client retries dropped connections, time-outs, 408, 409, 429 and 5xx.

    Args:
        url: with `/v1`, as OpenAI's base_url.
        model: None: the only model, or the first, that the server names.
        timeout: seconds for one attempt.
        api_key: None: that of OPENAI_API_KEY; without one, none is sent.
    """

    def __init__(
        self, url: str, model: str | None, retries: int = 5, timeout: float = 600, api_key: str | None = None
    ) -> None:
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.url = url
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=retries, timeout=timeout)
        self.trust = TrustRequests(self._client)
        self._model = model
        self._refuses_logprobs = False  # once the server has said so

    async def model(self) -> str:
        """The model that is asked.

        Raises:
            SetupError: the server does not answer, or names no model.
        """
        if self._model is None:
            try:
                models = (await self._client.models.list()).data
            except openai.OpenAIError as error:
                raise SetupError(f"{self.url}/models: {error}, wanted a list of models; is the server up?") from None
            if not models:
                raise SetupError(f"{self.url}/models: found none, wanted a model")
            self._model = models[0].id
        return self._model

    async def version(self) -> str | None:
        """What vLLM says at /version; None for other servers."""
        try:
            root = openai.AsyncOpenAI(
                base_url=self.url.rstrip("/").removesuffix("/v1"), api_key="none", max_retries=0, timeout=10
            )
            async with root:
                found = await root.get("/version", cast_to=dict[str, Any])
            return str(found["version"])
        except (openai.OpenAIError, KeyError, TypeError, ValueError):
            return None

    async def ask(self, question: Question, slide_url: str | None, mode: Mode, max_tokens: int) -> Answer:
        """Asks one question.

        In mode "choice" it asks for log-probabilities. Where the server refuses them, or none of them is a label's, it
        asks a second time, by structured outputs.

        Raises:
            openai.OpenAIError: the server refused the question, or did not answer in all attempts.
            KeyError, TypeError, ValueError, IndexError: the response is none of a chat completion.
        """
        if not (mode == "choice" and (self._refuses_logprobs or needs_structure(question))):
            try:
                answer = await self._ask(question, slide_url, mode, max_tokens, False)
            except openai.BadRequestError as error:
                if mode == "generate" or "logprobs" not in str(error).lower():
                    raise
                self._refuses_logprobs = True
            else:
                if mode == "generate" or answer.score.label is not None:
                    return answer
        return await self._ask(question, slide_url, mode, max_tokens, True)

    async def _ask(
        self, question: Question, slide_url: str | None, mode: Mode, max_tokens: int, structured: bool
    ) -> Answer:
        body = request_body(question, slide_url, mode, await self.model(), max_tokens, structured)
        response = await self._client.post("/chat/completions", body=body, cast_to=dict[str, Any])
        return read_answer(question, mode, response, structured)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()


async def ask_endpoint(evaluation: Evaluation, endpoint: Endpoint) -> None:
    """Asks every arm's open questions, a bounded number at once; each row is on disk as soon as it is there.

    Raises:
        SetupError: the server is not there, refuses the key or the model, or has stopped answering.
    """
    model, found = await endpoint.model(), await endpoint.version()
    try:
        for arm in evaluation.arms:
            with evaluation.recorder(arm, model, endpoint.url, {"server": found}) as recorder:
                await _ask_arm(evaluation, endpoint, arm, recorder)
    finally:
        endpoint.trust.log()


async def _ask_arm(evaluation: Evaluation, endpoint: Endpoint, arm: Arm, recorder: Recorder) -> None:
    todo = iter(recorder.todo)  # shared by all workers
    concurrency, max_tokens = evaluation.settings.concurrency, evaluation.settings.max_tokens
    unreachable = 0  # questions on end

    async def work() -> None:
        nonlocal unreachable
        for question in todo:
            began = time.monotonic()
            ready = await asyncio.to_thread(evaluation.prepare, question, arm)
            if isinstance(ready, Row):
                recorder.record(ready)
                continue
            try:
                answer = await endpoint.ask(question, ready.url, arm.mode, max_tokens)
            except FATAL as error:
                raise SetupError(f"{endpoint.url}: {error}") from None
            except (openai.OpenAIError, *BAD_RESPONSE) as error:
                unreachable += isinstance(error, openai.APIConnectionError)
                recorder.record(ready.failed(error_text(error), round(time.monotonic() - began, 3)))
                if unreachable >= MAX_UNREACHABLE_ROUNDS * concurrency:
                    raise SetupError(
                        f"{endpoint.url}: found no connection for {unreachable} questions on end, wanted answers; "
                        "what was answered is kept, the same command goes on"
                    ) from None
            else:
                unreachable, seconds = 0, round(time.monotonic() - began, 3)
                trust = await _trust(evaluation, endpoint, ready, answer)
                recorder.record(ready.answered(answer, trust, seconds))

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _trust(evaluation: Evaluation, endpoint: Endpoint, ready: PreparedQuestion, answer: Answer) -> SlideTrust:
    """What the server says beside an answer; of a baseline the checkpoint's temperature alone."""
    if ready.is_selected:
        assert ready.url is not None
        return await endpoint.trust.of_slide(ready.question, ready.url)
    if answer.logprobs is None:
        return SlideTrust()
    whole = evaluation.files.url(ready.slide)
    return SlideTrust(answer_temperature=await endpoint.trust.temperature(ready.question, whole))
