"""What is sent to an OpenAI-compatible server, what is read from its answer, and how it is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import openai

from vllm_wsi.errors import SetupError

from .parsing import parse_label
from .tasks import Question, Score, score, to_messages

Mode = Literal["generate", "choice"]
TOP_LOGPROBS = 20
"""As many as OpenAI and vLLM give without further settings."""
FATAL = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)


@dataclass(frozen=True)
class Answer:
    """A server's answer, judged."""

    score: Score
    output: str
    logprobs: Mapping[str, float] | None
    finish_reason: str | None


def request_body(
    question: Question, slide_url: str | None, mode: Mode, model: str, max_tokens: int, structured: bool = False
) -> dict[str, Any]:
    """The JSON of POST /v1/chat/completions; greedy.

    `choice` asks for one token and its log-probabilities, or, with `structured`, for vLLM's `structured_outputs`: one
    of the labels (its older name `guided_choice` is ignored without a word by vLLM 0.32).
    """
    body: dict[str, Any] = {"model": model, "messages": to_messages(question, slide_url), "temperature": 0.0}
    if mode == "generate":
        return {**body, "max_tokens": max_tokens}
    if structured:
        return {**body, "max_tokens": 8, "structured_outputs": {"choice": list(question.options)}}
    return {**body, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}


def needs_structure(question: Question) -> bool:
    """Whether labels are longer than one character, so that a first token need not tell them apart."""
    return any(len(label) > 1 for label in question.options)


def read_answer(question: Question, mode: Mode, response: Mapping[str, Any], structured: bool = False) -> Answer:
    """Judges the JSON of a chat completion.

    `choice`: the label with the largest probability among the first token's 20 likeliest, "B" and " B" taken together;
    it is the likeliest of all labels, as one that is not among the 20 is less likely. Without any it has none.

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
    places = (choices[0].get("logprobs") or {}).get("content") or []
    found: dict[str, float] = {}
    for token in places[0].get("top_logprobs") or [] if places else []:
        label, logprob = str(token["token"]).strip(), float(token["logprob"])
        if label in question.options and math.isfinite(logprob):
            found[label] = float(_logaddexp(found[label], logprob)) if label in found else logprob
    best = max(sorted(found), key=lambda label: found[label]) if found else None
    return Answer(Score(best, "logprobs" if found else "none", best == question.gold), output, found or None, finish)


def _logaddexp(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))


class Endpoint:
    """An OpenAI-compatible server. The openai client retries dropped connections, time-outs, 408, 409, 429 and 5xx.

    Args:
        url: with `/v1`, as OpenAI's base_url.
        model: None: the only, or first, that the server names.
        timeout: seconds for one attempt.
        api_key: None: OPENAI_API_KEY, or none.
    """

    def __init__(
        self, url: str, model: str | None, retries: int = 5, timeout: float = 600, api_key: str | None = None
    ) -> None:
        import os

        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self.url = url
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=retries, timeout=timeout)
        self._model = model
        self._structured = False  # once a server has refused log-probabilities

    async def model(self) -> str:
        """The model that is asked. Raises SetupError where the server does not answer."""
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

        Raises:
            openai.OpenAIError: the server refused it, or did not answer in all attempts.
        """
        structured = mode == "choice" and (self._structured or needs_structure(question))
        if not structured:
            try:
                answer = await self._ask(question, slide_url, mode, max_tokens, False)
            except openai.BadRequestError as error:
                if mode == "generate" or "logprobs" not in str(error).lower():
                    raise
                self._structured = True
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
        await self._client.close()
