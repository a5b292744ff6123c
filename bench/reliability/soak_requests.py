"""The mixed requests of the soak, each with the outcome that it must have."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import openai

from bench.reliability.random_slides import MAX_PATCHES, Slides, write

K, MAX_K, MAX_SLIDES, MAX_TOKENS, GONE_TOKENS = 32, 256, 3, 8, 64
TIMEOUT_SECONDS = 120
GONE_SECONDS = 0.1  # a client goes away within this time

# Of every hundred requests.
MIXTURE = {
    "new": 20, "repeated": 14, "text": 8, "several": 8, "other k": 6, "by value": 8, "web": 6,
    "goes away": 8, "rewritten": 6, "select": 5, "heat map": 5, "broken": 6,
}  # fmt: skip


class WrongOutcome(Exception):
    """A request did not end as it must; one sentence."""


class Requests:
    """Makes mixed requests to one server; chat requests are streamed or not, by chance.

    Every answer's number of prompt tokens must be that of the question and of the patches that each of its slides
    keeps: the byte tokenizer makes one token of each character.

    Args:
        api: URL of the server's API.
        web: root URL of a web server of the slides' folder.
        seed: of what is asked, and in which order.
    """

    def __init__(self, api: str, model: str, slides: Slides, web: str, seed: int) -> None:
        self._api, self._model, self._slides, self._web = api, model, slides, web
        self._random = random.Random(seed)
        self._asked = 0
        self._template_tokens: int | None = None
        self._known = [slides.new() for _ in range(6)]
        self._rewritten = [(slides.folder / f"rewritten-{i}.safetensors", asyncio.Lock()) for i in range(3)]
        self._broken = slides.broken()
        self.done: Counter[str] = Counter()  # by kind
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "new": self._new, "repeated": self._repeated, "text": self._text, "several": self._several,
            "other k": self._other_k, "by value": self._by_value, "web": self._from_the_web,
            "goes away": self._goes_away, "rewritten": self._rewrite, "select": self._select,
            "heat map": self._heat_map, "broken": self._broken_file,
        }  # fmt: skip

    async def run(self, count: int, in_flight: int) -> list[str]:
        """Makes `count` requests, `in_flight` at a time, over connections that are closed at the end.

        Returns:
            One sentence for each request that did not end as it must.
        """
        kinds = [kind for kind, share in MIXTURE.items() for _ in range(share)]
        hundreds = (self._random.sample(kinds, len(kinds)) for _ in range(-(-count // len(kinds))))
        todo = iter([kind for hundred in hundreds for kind in hundred][:count])
        wrong: list[str] = []
        # The server closes a connection that idles for 5 s; a client that waits as long might use it just then.
        limits = httpx.Limits(keepalive_expiry=1)
        self._http = openai.DefaultAsyncHttpxClient(timeout=TIMEOUT_SECONDS, limits=limits)
        self._client = openai.AsyncOpenAI(base_url=self._api, api_key="none", max_retries=0, http_client=self._http)
        async with self._http:
            if self._template_tokens is None:
                self._template_tokens = await self._tokens_of_one_answer([], "?") - 1
                # The first message of 64 KiB between the server's processes makes pyzmq start a thread, which stays.
                path, num_patches = max(self._known, key=lambda slide: slide[1])
                await self._ask((f"{path.as_uri()}#k={MAX_K}", min(num_patches, MAX_K)))
            await asyncio.gather(*(self._work(todo, wrong) for _ in range(in_flight)))
        return wrong

    async def _work(self, todo: Iterator[str], wrong: list[str]) -> None:
        for kind in todo:
            try:
                await self._kinds[kind]()
            except (WrongOutcome, openai.OpenAIError, httpx.HTTPError) as error:
                wrong.append(f"{kind}: {type(error).__name__}: {error}"[:400])
            self.done[kind] += 1

    async def _ask(self, *slides: tuple[str, int]) -> None:
        """A chat about slides, (URL, patches that it keeps) each, which must be answered."""
        self._asked += 1
        question = f"{self._asked:06d} What is it?" + "." * self._random.randrange(60)
        tokens = await self._tokens_of_one_answer([url for url, _ in slides], question)
        assert self._template_tokens is not None
        wanted = self._template_tokens + len(question) + sum(kept for _, kept in slides)
        if tokens != wanted:
            raise WrongOutcome(f"prompt: found {tokens} tokens, wanted {wanted}")

    async def _tokens_of_one_answer(self, urls: list[str], question: str) -> int:
        """Number of tokens of the prompt of an answered chat."""
        options: dict[str, Any] = self._chat(urls, question, MAX_TOKENS)
        if self._random.random() < 0.5:
            answer = await self._client.chat.completions.create(**options)
            reasons, usage = [choice.finish_reason for choice in answer.choices], answer.usage
        else:
            stream = await self._client.chat.completions.create(
                stream=True, stream_options={"include_usage": True}, **options
            )
            chunks = [chunk async for chunk in stream]
            reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
            usage = chunks[-1].usage
        if usage is None or len(reasons) != 1 or reasons[0] not in ("stop", "length"):
            raise WrongOutcome(f"answer: found the ends {reasons} and the usage {usage}, wanted one end and its usage")
        return usage.prompt_tokens

    def _chat(self, urls: list[str], question: str, max_tokens: int) -> dict[str, Any]:
        parts: list[dict] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        parts.append({"type": "text", "text": question})
        messages = [{"role": "user", "content": parts}]
        return {"model": self._model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}

    async def _new(self) -> None:
        path, num_patches = self._slides.new()
        await self._ask((path.as_uri(), min(num_patches, K)))
        path.unlink()

    async def _repeated(self) -> None:
        path, num_patches = self._random.choice(self._known)
        await self._ask((path.as_uri(), min(num_patches, K)))

    async def _text(self) -> None:
        await self._ask()

    async def _several(self) -> None:
        path, num_patches = self._slides.new()
        known = self._random.choices(self._known, k=self._random.randint(1, MAX_SLIDES - 1))
        await self._ask(*((path.as_uri(), min(n, K)) for path, n in [(path, num_patches), *known]))
        path.unlink()

    async def _other_k(self) -> None:
        k = self._random.randint(1, MAX_K)
        path, num_patches = self._random.choice(self._known)
        await self._ask((f"{path.as_uri()}#k={k}", min(num_patches, k)))

    async def _by_value(self) -> None:
        url, num_patches = self._slides.data_url()
        await self._ask((url, min(num_patches, K)))

    async def _from_the_web(self) -> None:
        path, num_patches = self._slides.new()
        await self._ask((f"{self._web}/{path.name}", min(num_patches, K)))
        path.unlink()

    async def _goes_away(self) -> None:
        """A client that leaves, before the answer or in the midst of it. Its slide may be gone as early as itself."""
        path, _ = self._slides.new()
        options = self._chat([path.as_uri()], "What is it?", GONE_TOKENS)
        try:
            async with asyncio.timeout(self._random.uniform(0, GONE_SECONDS)):
                stream = await self._client.chat.completions.create(stream=True, **options)
                async for _ in stream:
                    pass
        except TimeoutError:
            pass
        path.unlink()

    async def _rewrite(self) -> None:
        """A file that was asked about before is another slide by now: replaced by a rename, or written in place."""
        path, lock = self._random.choice(self._rewritten)
        num_patches = self._random.randint(1, K - 1)  # fewer than K: the number of tokens tells one from the other
        async with lock:
            other = path.with_name(f"next-{path.name}")
            write(other, self._slides.features(num_patches))
            if self._random.random() < 0.5:
                path.write_bytes(other.read_bytes())
            else:
                other.replace(path)
            await self._ask((path.as_uri(), num_patches))

    async def _select(self) -> None:
        path, num_patches = self._slides.new() if self._random.random() < 0.5 else self._random.choice(self._known)
        answer = await self._http.post(f"{self._api}/wsi/select", json={"url": path.as_uri()})
        if answer.status_code != 200:
            raise WrongOutcome(f"status: found {answer.status_code} {answer.text}, wanted 200")
        found, wanted = answer.json(), (num_patches, min(num_patches, K))
        if (found["num_patches"], len(found["indices"])) != wanted:
            raise WrongOutcome(f"selection: found {found['num_patches']}, {len(found['indices'])}, wanted {wanted}")

    async def _heat_map(self) -> None:
        path, _ = self._slides.new("safetensors", self._random.randint(100, MAX_PATCHES))
        answer = await self._http.get(f"{self._api}/wsi/heatmap.png", params={"url": path.as_uri()})
        if answer.status_code != 200 or not answer.content.startswith(b"\x89PNG"):
            raise WrongOutcome(f"heat map: found {answer.status_code} {answer.content[:200]!r}, wanted a PNG")
        path.unlink()

    async def _broken_file(self) -> None:
        fault, (url, status) = self._random.choice([*self._broken.items(), ("404", (f"{self._web}/no.h5", 422))])
        try:
            await self._tokens_of_one_answer([url], "What is it?")
        except openai.APIStatusError as error:
            if error.status_code != status:
                raise WrongOutcome(f"{fault}: found {error.status_code} {error.body}, wanted {status}") from error
        else:
            raise WrongOutcome(f"{fault}: found an answer, wanted {status}")
