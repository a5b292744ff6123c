"""A real `vllm serve --plugin vllm_wsi`, asked by the official client and by plain HTTP."""

import base64
import concurrent.futures
import http.server
import io
import os
import pickle
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from vllm_wsi.slides import open_features

from .conftest import KEY, D, make_slide, slide_message
from .odd_slides import make_odd_slides

pytestmark = pytest.mark.server
TOKENS = 6


@pytest.fixture(scope="module")
def media(shared_folder) -> Path:
    folder = shared_folder / "server"
    folder.mkdir()
    for name, n in (("a", 300), ("b", 400), ("c", 20)):
        make_slide(folder / f"{name}.safetensors", n, seed=n)
    return folder


@pytest.fixture(scope="module")
def server(shared_server):
    return shared_server


def select(server, body):
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.api}/wsi/select", json=body, headers=headers, timeout=60)


def ask(client, *urls, question="What is it?", model=None, **options):
    messages = options.pop("messages", None) or slide_message(*urls, question=question)
    model = model or client.models.list().data[0].id
    return client.chat.completions.create(model=model, messages=messages, max_tokens=TOKENS, temperature=0, **options)


def text(answer) -> str:
    return answer.choices[0].message.content


def refused(client, *urls, **options) -> str:
    """The sentence of the 4xx that a request gets."""
    with pytest.raises(openai.APIStatusError) as error:
        ask(client, *urls, **options)
    assert 400 <= error.value.status_code < 500
    return error.value.body["message"]


class Counters:
    """What the server counted since this was made."""

    def __init__(self, server):
        self._server, self._before = server, server.metrics()

    def __getitem__(self, name: str) -> float:
        key = f"vllm_wsi:{name}_total"
        return self._server.metrics().get(key, 0) - self._before.get(key, 0)


def test_a_second_question_about_a_slide_reads_and_selects_nothing(server, client, media):
    url = make_slide(media / "second.safetensors", 500).as_uri()
    counters = Counters(server)
    ask(client, url, question="What is it?")
    assert (counters["selections"], counters["patches_read"]) == (1, 500)
    ask(client, url, question="And where?")
    assert (counters["selections"], counters["patches_read"], counters["selection_cache_hits"]) == (1, 500, 1)


def test_sixty_four_requests_at_once_for_a_new_slide_run_one_selection(server, client, media):
    path = make_slide(media / "crowd.safetensors", 800)
    hold = Path(f"{path}.hold")
    hold.touch()
    model, counters = client.models.list().data[0].id, Counters(server)
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        futures = [pool.submit(ask, client, path.as_uri(), model=model) for _ in range(64)]
        while counters["selections_joined"] < 63:
            assert not any(future.done() for future in futures)
            time.sleep(0.05)
        hold.unlink()
        answers = {text(future.result()) for future in futures}
    assert len(answers) == 1
    assert counters["selections"] == 1


def test_a_held_slide_delays_neither_a_known_nor_another_new_slide(client, media):
    known = media / "a.safetensors"
    wanted = text(ask(client, known.as_uri()))
    blocked, new = (make_slide(media / f"{name}.safetensors", 100, seed=9) for name in ("blocked", "new"))
    hold = Path(f"{blocked}.hold")
    hold.touch()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        held = pool.submit(ask, client, blocked.as_uri())
        assert text(ask(client, known.as_uri())) == wanted
        from_new = text(ask(client, new.as_uri()))
        assert not held.done()
        hold.unlink()
        assert text(held.result()) == from_new  # the same features under another name


def test_a_file_replaced_under_its_name_is_answered_anew(client, media):
    path = make_slide(media / "replaced.safetensors", 300, seed=1)
    first = text(ask(client, path.as_uri()))
    make_slide(path, 300, seed=2)
    other = make_slide(media / "other.safetensors", 300, seed=2)
    second = text(ask(client, path.as_uri()))
    assert second != first
    assert second == text(ask(client, other.as_uri()))


def test_a_clients_uuid_never_makes_one_slide_answer_for_another(client, media):
    def with_uuid(name):
        messages = slide_message((media / name).as_uri())
        messages[0]["content"][0]["uuid"] = "the-same"
        return text(ask(client, messages=messages))

    plain = [text(ask(client, (media / name).as_uri())) for name in ("a.safetensors", "b.safetensors")]
    assert plain[0] != plain[1]
    assert [with_uuid(name) for name in ("a.safetensors", "b.safetensors")] == plain


def test_a_uuid_without_a_slide_is_refused(client):
    messages = slide_message()
    messages[0]["content"].insert(0, {"type": "image_url", "image_url": None, "uuid": "known"})
    assert "uuid" in refused(client, messages=messages)


def test_streamed_text_equals_the_whole_answer(client, media):
    url = (media / "a.safetensors").as_uri()
    parts = [c.choices[0].delta.content or "" for c in ask(client, url, stream=True) if c.choices]
    assert "".join(parts) == text(ask(client, url))


def test_the_responses_api_answers_as_chat_does(client, media):
    url = (media / "a.safetensors").as_uri()
    content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What is it?"}]
    answer = client.responses.create(
        model=client.models.list().data[0].id,
        input=[{"role": "user", "content": content}],
        max_output_tokens=TOKENS,
        temperature=0,
    )
    assert answer.output_text == text(ask(client, url))


def test_slides_of_fewer_and_more_patches_than_k_take_as_many_tokens_as_they_keep(client, media):
    few, many = ((media / name).as_uri() for name in ("c.safetensors", "a.safetensors"))
    used = [ask(client, *urls).usage.prompt_tokens for urls in ([few], [many], [few, many])]
    assert used[1] - used[0] == 32 - 20
    assert used[2] - used[1] == 20


def test_k_of_the_url_keeps_that_many(server, client, media):
    url = (media / "a.safetensors").as_uri()
    used = {k: ask(client, f"{url}#k={k}").usage.prompt_tokens for k in (1, 32, 64)}
    assert (used[32] - used[1], used[64] - used[32]) == (31, 32)
    assert select(server, {"url": f"{url}#k=7"}).json()["num_selected"] == 7


@pytest.mark.parametrize("fragment", ["k=0", "k=257", "k=-1", "k=many", "k=", "size=3", "nonsense"])
def test_a_wrong_fragment_is_refused(client, media, fragment):
    sentence = refused(client, f"{(media / 'a.safetensors').as_uri()}#{fragment}")
    assert "wanted" in sentence


def test_a_slide_sent_by_value_answers_as_its_file_does(client, media):
    path = media / "a.safetensors"
    wanted = text(ask(client, path.as_uri()))
    data = base64.b64encode(path.read_bytes()).decode()
    assert text(ask(client, f"data:application/octet-stream;base64,{data}")) == wanted
    in_lines = base64.encodebytes(path.read_bytes()).decode()
    assert text(ask(client, f"data:application/octet-stream;base64,{in_lines}")) == wanted
    with open_features(path) as slide:
        rows = slide.read_rows(0, slide.num_patches)
    for payload in (saved(torch.from_numpy(rows)), saved(rows, np.save), path.read_bytes()):
        assert text(ask(client, messages=embeds_message(base64.encodebytes(payload).decode()))) == wanted


def saved(values, save=None) -> bytes:
    """What `torch.save` (or `numpy.save`) writes."""
    buffer = io.BytesIO()
    if save is None:
        torch.save(values, buffer)
    else:
        save(buffer, values)
    return buffer.getvalue()


def embeds_message(payload) -> list:
    messages = slide_message()
    messages[0]["content"].insert(0, {"type": "image_embeds", "image_embeds": payload})
    return messages


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (b"", "found no bytes"),
        (b"PK\x03\x04 and then nothing", "broken zip archive"),
        (saved(torch.ones(20, D))[:-200], "broken zip archive"),
        (saved(torch.ones(D)), "one vector for a whole slide"),
        (saved(np.ones(D, np.float32), np.save), "one vector for a whole slide"),
        (saved(torch.ones(20, D, dtype=torch.int64)), "dtype int64"),
        (saved(torch.ones(20, D).to_sparse()), "wanted a dense one"),
        (saved({"file": "/etc/passwd"}), "wanted"),
        (saved(np.array([{"a": 1}], object), np.save), "pickled Python object"),
        (pickle.dumps(np.ones((20, D))), "found a pickle"),
        (saved(torch.ones(20, D + 1)), f"found d = {D + 1}, wanted {D}"),
    ],
)
def test_malformed_image_embeds_are_a_4xx_with_one_sentence(client, payload, sentence):
    assert sentence in refused(client, messages=embeds_message(base64.b64encode(payload).decode()))


@pytest.mark.parametrize(
    "payload", ["@@@", "abc", "\u00e9", "", {"a": 5}, {"a": [1]}, {"a": None}, {}, {"a": {}}, 5, [1]]
)
def test_image_embeds_that_are_no_base64_of_features_are_a_4xx(client, payload):
    assert refused(client, messages=embeds_message(payload))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WebP", "BMP"])
def test_a_picture_of_a_chat_client_is_called_that_and_what_to_send_is_said(client, media, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "pink").save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    path = media / f"picture.{kind.lower()}"
    path.write_bytes(buffer.getvalue())
    for url in (f"data:image/{kind.lower()};base64,{data}", path.as_uri()):
        sentence = refused(client, url)
        assert f"found a {kind} picture, wanted the features of a slide" in sentence
        assert "vllm-wsi encode SLIDE --encoder NAME" in sentence
        assert "vllm-wsi-" not in sentence  # the spool file's name


def test_one_broken_image_embeds_part_beside_a_good_one_is_a_4xx(client):
    good = base64.b64encode(saved(torch.ones(20, D))).decode()
    for broken in (None, {"a": good}, {"a": 5}):
        messages = embeds_message(good)
        messages[0]["content"].insert(1, {"type": "image_embeds", "image_embeds": broken, "uuid": "u"})
        assert "wanted the features of one slide" in refused(client, messages=messages)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [("", "found an empty URL"), (" ", "found an empty URL"), ("#k=3", "found an empty URL"),
     ("data:image/png;base64,", "found no bytes")],
)  # fmt: skip
def test_an_empty_url_is_called_that(client, url, sentence):
    assert sentence in refused(client, url)


@pytest.fixture
def web(media):
    """A web server of the media folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(media))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_slide_on_the_web_answers_as_its_file_does(client, media, web):
    assert text(ask(client, f"{web}/a.safetensors")) == text(ask(client, (media / "a.safetensors").as_uri()))


def test_a_slide_in_object_storage_answers_as_its_file_does(client, media, s3):
    s3[0].upload_file(str(media / "a.safetensors"), "slides", "served/a.safetensors")
    wanted = text(ask(client, (media / "a.safetensors").as_uri()))
    assert [text(ask(client, "s3://slides/served/a.safetensors")) for _ in range(2)] == [wanted, wanted]
    assert "--allowed-media-domains" in refused(client, "s3://others/a.safetensors")
    assert "no such object" in refused(client, "s3://slides/served/b.safetensors")


def test_a_slide_that_cannot_be_fetched_is_refused(client, web):
    assert "404" in refused(client, f"{web}/nosuch.safetensors")
    assert "could not be fetched" in refused(client, "http://127.0.0.1:9/a.safetensors")


def test_every_odd_slide_is_a_4xx_with_one_sentence_and_the_next_request_answers(server, client, media):
    good = (media / "a.safetensors").as_uri()
    wanted = text(ask(client, good))
    for what, (path, sentence) in make_odd_slides(media).items():
        message = refused(client, path.as_uri())
        assert sentence in message, what
        assert path.name in message, what
        assert "\n" not in message, what
        assert text(ask(client, good)) == wanted, what
        answer = select(server, {"url": path.as_uri()})
        assert answer.status_code == 400, what
        assert sentence in answer.text or sentence.replace('"', '\\"') in answer.text, what


@pytest.mark.parametrize("url", ["file:///etc/passwd", "{media}/../../outside.safetensors", "{media}/link.safetensors"])
def test_a_file_outside_the_allowed_path_is_refused(client, media, tmp_path, url):
    outside = make_slide(tmp_path / "outside.safetensors", 10)
    link = media / "link.safetensors"
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    assert "allowed-local-media-path" in refused(client, url.format(media=media.as_uri()))


@pytest.mark.parametrize(
    "url", ["data:text/plain,abc", "data:application/x;base64,@@@", "ftp://host/a.h5", "a.h5", "data:x"]
)
def test_a_url_that_leads_nowhere_is_refused(client, url):
    assert refused(client, url)


def test_a_slide_token_typed_into_the_question_is_refused(client, media):
    for urls in ([], [(media / "a.safetensors").as_uri()]):
        assert "slide tokens" in refused(client, *urls, question="What is <|slide|>?")


def test_a_placeholder_without_a_slide_is_refused(client):
    model = client.models.list().data[0].id
    for prompt in ("<|slide|> What is it?", [1, 2, 258, 3]):
        with pytest.raises(openai.BadRequestError, match="slide tokens"):
            client.completions.create(model=model, prompt=prompt, max_tokens=2)


def test_more_slides_than_the_server_takes_are_refused(client, media):
    assert "At most 2" in refused(client, *[(media / "a.safetensors").as_uri()] * 3)


def test_text_alone_is_answered(client):
    assert ask(client, question="Hello").usage.completion_tokens > 0


def test_the_endpoint_tells_the_patches_that_the_model_was_given(server, client, media):
    from vllm_wsi.model.checkpoint import load_selector

    url = (media / "b.safetensors").as_uri()
    ask(client, url)
    counters = Counters(server)
    selection = select(server, {"url": url}).json()
    assert counters["selections"] == 0
    with open_features(media / "b.safetensors") as slide:
        record = load_selector(server.model).select(slide).record()
    assert {key: selection[key] for key in record} == record


def test_the_endpoint_refuses_unknown_fields(server, media):
    body = {"url": (media / "a.safetensors").as_uri(), "kk": 3}
    assert select(server, body).status_code in (400, 422)


def test_the_real_slide_is_served(client, server, shared_data, media):
    """Of another feature size than this checkpoint's: the refusal shows that it was read (parity: test_parity.py)."""
    link = media / "real.h5"
    link.write_bytes((shared_data / "features/mopadi_TCGA-AD-6964/features.h5").read_bytes())
    assert f"feats: found d = 512, wanted {D}" in refused(client, link.as_uri())


def test_the_server_is_still_the_same_process_and_holds_no_slide_open(server, client, media):
    ask(client, (media / "a.safetensors").as_uri())
    assert server.is_alive
    links = [os.readlink(f"/proc/{server.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{server.pid}/fd")]
    assert not [name for name in links if str(media) in name]
