"""The question of a conversation reaches the selection: vLLM fetches media before it knows a prompt.

Where a scorer hears the question, each slide's URL of a conversation gets the question as its fragment, `#q=...`,
before vLLM parses the messages. So unmodified clients ask as they always did, and everything behind (cache, store,
hashes, prefix caching) sees the question by the URL alone. `model/question_text.py` says which text that is; several
slides get the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, quote

from vllm_wsi.errors import encodable
from vllm_wsi.model.question_text import question_text

from .vllm_hooks import current_service


def telling_slides_the_question(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `BaseRenderer.render_chat` and `render_chat_async`, whose first argument is a list of conversations."""

    def render(self: Any, conversations: Sequence[list], *args: Any, **kwargs: Any) -> Any:
        service = current_service()
        if service is not None and service.questions is not None:
            conversations = [with_question(messages) for messages in conversations]
        return original(self, conversations, *args, **kwargs)

    return render


def with_question(messages: Sequence[Any]) -> list[Any]:
    """The messages, with the last user turn's text in the URLs of all slides that name no question themselves."""
    question = next((asked for one in reversed(messages) if (asked := _user_text(one))), "")
    if not question:
        return list(messages)
    return [_with_question(message, question) for message in messages]


def _user_text(message: Any) -> str:
    """Empty where it is no user turn, or holds slides alone."""
    if not isinstance(message, Mapping) or message.get("role") != "user":
        return ""
    content = message.get("content")
    parts = [content] if isinstance(content, str) else content if isinstance(content, Sequence) else []
    return question_text([text for part in parts if (text := _text(part)) is not None])


def _text(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type", "text") not in ("text", "input_text"):
        return None
    text = part.get("text")
    return text if isinstance(text, str) else None


def _with_question(message: Any, question: str) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str) or not isinstance(content, Sequence):
        return message
    return {**message, "content": [_asking(part, question) for part in content]}


def _asking(part: Any, question: str) -> Any:
    """The part, if it is a slide's URL in any of the forms that vLLM takes, with the question."""
    image = part.get("image_url") if isinstance(part, Mapping) else None
    if isinstance(image, str):
        return {**part, "image_url": _url(image, question)}
    if isinstance(image, Mapping) and isinstance(url := image.get("url"), str):
        return {**part, "image_url": {**image, "url": _url(url, question)}}
    return part


def _url(url: str, question: str) -> str:
    place, _, fragment = url.partition("#")
    if not place.strip() or "q" in parse_qs(fragment, keep_blank_values=True):
        return url
    return f"{place}#{fragment}{'&' if fragment else ''}q={quote(encodable(question), safe='')}"
