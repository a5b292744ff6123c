"""Whatever a request holds beside its slide's URL, no file of the server is opened for it, and none is told of."""

import base64
import ctypes
import json
import os
import struct
from pathlib import Path

import httpx
import pytest

from .conftest import KEY, make_slide

try:
    from vllm.renderers.chat_utils.chat_message import MM_PARSER_MAP  # vLLM 0.33
except ImportError:
    from vllm.renderers.chat_utils import MM_PARSER_MAP

pytestmark = pytest.mark.server
IN_OPEN = 0x20
SECRET = "the-words-of-a-secret-file"


class OpenedFiles:
    """Counts how often files are opened, whoever does it (Linux's inotify)."""

    def __init__(self, *paths: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK)
        assert self._fd >= 0
        for path in paths:
            assert self._libc.inotify_add_watch(self._fd, str(path).encode(), IN_OPEN) >= 0

    def count(self) -> int:
        try:
            return len(os.read(self._fd, 1 << 16)) // struct.calcsize("iIII")
        except BlockingIOError:
            return 0

    def close(self) -> None:
        os.close(self._fd)


def test_files_that_are_opened_are_counted(tmp_path):
    path = tmp_path / "a"
    path.touch()
    opened = OpenedFiles(path)
    assert opened.count() == 0
    path.read_bytes()
    assert opened.count() == 1
    opened.close()


def parts(path: str) -> dict[str, list[dict]]:
    """For each type of part that vLLM's chat parser knows: parts that name a file."""
    tensor = base64.b64encode(b"no tensor").decode()
    embeds = [path, {path: tensor}, {path: path}, {path: [1.0]}, [path]]
    return {
        "text": [{"text": path}],
        "thinking": [{"thinking": path}],
        "input_text": [{"text": path}],
        "output_text": [{"text": path}],
        "refusal": [{"refusal": path}],
        "tool_reference": [{"name": path}],
        "input_image": [{"image_url": path}, {"image_url": f"file://{path}"}, {"file_id": path}, {"file_url": path}],
        "image_url": [{"image_url": {"url": url}} for url in (path, f"file://{path}", f"FILE://localhost{path}")],
        "image_pil": [{"image_pil": held} for held in (path, [path], {"path": path}, [[path]], {"image": path})],
        "image_embeds": [{"image_embeds": held} for held in embeds],
        "audio_embeds": [{"audio_embeds": held} for held in embeds],
        "video_embeds": [{"video_embeds": held} for held in embeds],
        "prompt_embeds": [{"data": path}],
        "audio_url": [{"audio_url": {"url": f"file://{path}"}}, {"audio_url": {"url": path}}],
        "video_url": [{"video_url": {"url": f"file://{path}"}}, {"video_url": {"url": path}}],
        "input_audio": [{"input_audio": {"data": path, "format": "wav"}}],
    }


TEXT = {"text", "thinking", "input_text", "output_text", "refusal", "tool_reference"}  # read as words, never as a path


def test_the_parts_that_are_tried_are_all_that_vllm_knows():
    assert set(parts("/")) == set(MM_PARSER_MAP)


def every_part(path: str) -> list[tuple[str, dict]]:
    """(kind, part), each also without its type and with a uuid, which vLLM parses in another way."""
    typed = [(kind, {"type": kind, **part}) for kind, some in parts(path).items() for part in some]
    untyped = [(kind, {k: v for k, v in part.items() if k != "type"}) for kind, part in typed]
    with_uuid = [(kind, {**part, "uuid": path}) for kind, part in typed]
    return typed + untyped + with_uuid


def anthropic(part: dict, path: str) -> list[dict]:
    """Anthropic's own blocks beside the part as it is."""
    sources = [
        {"type": "url", "url": path},
        {"type": "url", "url": f"file://{path}"},
        {"type": "file", "file_id": path},
        {"type": "base64", "media_type": "image/png", "data": path},
        {"type": "path", "path": path},
    ]
    return [part] + [{"type": "image", "source": source} for source in sources]


def bodies(path: str, model: str):
    """(route, kind, body) for every route that takes messages."""
    question = {"type": "text", "text": "What is it?"}
    for kind, part in every_part(path):
        messages = [{"role": "user", "content": [part, question]}]
        chat = {"model": model, "messages": messages, "max_tokens": 1}
        yield "/v1/chat/completions", kind, chat
        yield "/tokenize", kind, {"model": model, "messages": messages}
        yield "/invocations", kind, chat
        yield "/v1/chat/completions/batch", kind, {**chat, "messages": [messages]}
        yield "/v1/responses", kind, {"model": model, "input": messages, "max_output_tokens": 1}
    for block in anthropic({"type": "image_pil", "image_pil": path}, path):
        messages = [{"role": "user", "content": [block, question]}]
        for route in ("/v1/messages", "/v1/messages/count_tokens"):
            yield route, "anthropic", {"model": model, "messages": messages, "max_tokens": 1}
    for field in ("multi_modal_data", "image", "media_io_kwargs", "mm_processor_kwargs"):
        extra = {field: {"image": path}}
        yield "/v1/completions", field, {"model": model, "prompt": "<|slide|>", "max_tokens": 1, **extra}
        yield "/invocations", field, {"model": model, "prompt": path, "max_tokens": 1, **extra}


def test_no_part_of_any_route_opens_a_file_or_tells_whether_it_exists(shared_server, tmp_path):
    # Of one length and one name, since validators quote a request's first and last characters.
    files = [tmp_path / folder / "of-another-lab.safetensors" for folder in ("one", "two", "six")]
    for file in files:
        file.parent.mkdir()
    slide, secret, _ = files
    make_slide(slide, 20)
    secret.write_text(SECRET)
    opened, asked = OpenedFiles(slide, secret), 0
    before = shared_server.metrics()["vllm_wsi:selections_total"]
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=shared_server.root, headers=headers, timeout=60) as http:
        for tries in zip(*(bodies(str(file), shared_server.model) for file in files), strict=True):
            told = []
            for path, (route, kind, body) in zip(files, tries, strict=True):
                answer = http.post(route, json=body)
                asked += 1
                where = f"{route} {json.dumps(body)}: {answer.status_code} {answer.text}"
                assert answer.status_code < 500, where
                assert SECRET not in answer.text, where
                assert kind in TEXT or kind in ("multi_modal_data", "image") or answer.status_code >= 400, where
                if answer.status_code >= 400:
                    told.append((answer.status_code, answer.text.replace(str(path), "PATH")))
            assert len(set(told)) <= 1, told
    assert asked > 500
    assert opened.count() == 0
    opened.close()
    assert shared_server.metrics()["vllm_wsi:selections_total"] == before
