"""Slides in object storage: a real S3 server (moto), and servers that fail while they speak S3, Azure's or Google's."""

import asyncio
import json
import socket

import numpy as np
import pytest
from safetensors.numpy import save
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from vllm_wsi.errors import SlideError
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.serving import object_ranges, vllm_hooks
from vllm_wsi.serving.connector import CONNECTOR
from vllm_wsi.serving.object_ranges import ObjectPlace, object_place
from vllm_wsi.serving.remote_bytes import PART_BYTES
from vllm_wsi.store.store_settings import StoreSettings

from .conftest import s3_environment
from .test_remote_slides import fetch, same
from .web_server import D, WebServer

N = 80_000
ALLOWED = ["s3://slides", "gs://slides", "az://slides"]


def slide(seed=3, n=N):
    x = np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)
    coords = np.stack([np.arange(n) % 300, np.arange(n) // 300], axis=1).astype(np.int32) * 256
    return save({"features": x, "coords": coords}, {"patch_size_level0": "256"})


@pytest.fixture(scope="module")
def large():
    return slide()


@pytest.fixture
def connector(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "2")
    object_ranges._store.cache_clear()
    yield new_connector(monkeypatch, tmp_path)
    object_ranges._store.cache_clear()


def new_connector(monkeypatch, tmp_path):
    """As a server has it that starts now, with the store of `tmp_path`."""
    monkeypatch.setattr(vllm_hooks, "_current", None)
    monkeypatch.setattr(vllm_hooks, "_services", {})
    weights = seeded_scorer("patch", D, 16, seed=0).requires_grad_(False).weights()
    vllm_hooks.service_for(SlideSelector(weights, 8), "scorer", 16, StoreSettings(tmp_path / "store", 1 << 30))
    return MEDIA_CONNECTOR_REGISTRY.load(
        CONNECTOR, allowed_local_media_path=str(tmp_path), allowed_media_domains=[*ALLOWED, "127.0.0.1"]
    )


def at(monkeypatch, address):
    """The environment of a server whose S3 is there."""
    for name, value in s3_environment(address).items():
        monkeypatch.setenv(name, value)


def local(connector, tmp_path, data):
    (tmp_path / "local.safetensors").write_bytes(data)
    return connector.fetch_image((tmp_path / "local.safetensors").as_uri()).selection


@pytest.mark.parametrize("how", ["now", "awaited"])
def test_an_object_is_selected_as_the_same_file_and_known_from_then_on(
    how, s3, connector, monkeypatch, tmp_path, large
):
    client, address = s3
    at(monkeypatch, address)
    key = f"study {how}/a+b.safetensors"
    client.put_object(Bucket="slides", Key=key, Body=large)
    url = f"s3://slides/study%20{how}/a+b.safetensors"

    def ask(connector, url):
        return connector.fetch_image(url) if how == "now" else fetch(connector, url)

    first = ask(connector, url)
    assert first.source == "file"
    same(first.selection, local(connector, tmp_path, large))
    assert ask(connector, url).source == "memory"
    assert ask(connector, f"{url}#k=3").source == "stored scores"
    restarted = new_connector(monkeypatch, tmp_path)
    assert ask(restarted, url).source == "store"
    client.put_object(Bucket="slides", Key=key, Body=slide(seed=4, n=100))
    assert ask(restarted, url).selection.num_patches == 100


def test_a_format_that_needs_its_whole_file_is_read_too(s3, connector, monkeypatch, tmp_path):
    client, address = s3
    at(monkeypatch, address)
    x = np.random.default_rng(0).standard_normal((500, D)).astype(np.float32)
    np.savez_compressed(tmp_path / "a.npz", features=x)
    client.upload_file(str(tmp_path / "a.npz"), "slides", "a.npz")
    wanted = connector.fetch_image((tmp_path / "a.npz").as_uri()).selection
    found = fetch(connector, "s3://slides/a.npz").selection
    assert found.indices.tolist() == wanted.indices.tolist()
    assert found.features.equal(wanted.features)


def test_a_key_that_is_not_there_is_a_422_that_names_it(s3, connector, monkeypatch):
    at(monkeypatch, s3[1])
    with pytest.raises(VLLMUnprocessableEntityError, match=r"none\.h5: found no such object in s3://slides"):
        fetch(connector, "s3://slides/a/none.h5")


def test_an_object_larger_than_vllm_allows_is_not_read(s3, connector, monkeypatch, large):
    client, address = s3
    at(monkeypatch, address)
    monkeypatch.setenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", "2")
    client.put_object(Bucket="slides", Key="large.safetensors", Body=large)
    with pytest.raises(VLLMUnprocessableEntityError, match="VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB=2"):
        fetch(connector, "s3://slides/large.safetensors")


@pytest.mark.parametrize("url", ["s3://others/a.h5", "gs://others/a.h5", "S3://others/a.h5", "s3://127.0.0.1/a.h5"])
def test_a_bucket_that_no_option_names_is_refused_unasked(url, connector):
    with pytest.raises(SlideError, match="wanted one that --allowed-media-domains names"):
        fetch(connector, url)


def test_without_the_option_no_bucket_is_read(connector):
    connector.allowed_media_domains = []
    with pytest.raises(SlideError, match=r"names \(s3://slides\)"):
        connector.fetch_image("s3://slides/a.h5")


@pytest.mark.parametrize(
    "url",
    [
        "s3://id:secret@slides/a.h5", "s3://slides:9000/a.h5", "s3://slides/a.h5?AWS_SECRET=1", "s3://slides", "s3:///a",
        "s3://slides/", "s3:slides/a.h5", "az://slides/a?sig=1", "s3://[slides/a",
    ],
)  # fmt: skip
def test_a_url_that_holds_anything_beside_bucket_and_key_is_refused(url):
    with pytest.raises(SlideError, match=r"wanted (s3|az)://BUCKET/KEY"):
        object_place(url)


def test_where_an_object_lies_is_percent_decoded_as_in_any_url():
    assert object_place("s3://b/x%20y/z%23.h5") == ObjectPlace("s3", "b", "x y/z#.h5")
    assert object_place("GS://b/x") == ObjectPlace("gs", "b", "x")
    assert object_place("https://b/x") is None
    assert object_place("s3") is None


@pytest.fixture
def web(large):
    found = WebServer(large)
    found.modified = "Sun, 01 Nov 2026 10:00:00 GMT"
    yield found
    found.close()


def base(web):
    return web.url.rpartition("/slides/")[0]


def as_s3(web, monkeypatch, tmp_path):
    at(monkeypatch, base(web))


def as_azure(web, monkeypatch, tmp_path):
    account = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}
    for name, value in (account | {"AZURE_STORAGE_ENDPOINT": base(web), "AZURE_ALLOW_HTTP": "true"}).items():
        monkeypatch.setenv(name, value)


def as_google(web, monkeypatch, tmp_path):
    account = {"gcs_base_url": base(web), "disable_oauth": True}
    (tmp_path / "account.json").write_text(
        json.dumps(account | dict.fromkeys(("client_email", "private_key", "private_key_id"), ""))
    )
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))


CLOUDS = {"s3": as_s3, "az": as_azure, "gs": as_google}


@pytest.mark.parametrize("scheme", list(CLOUDS))
def test_each_clouds_objects_are_read_by_several_ranges_of_one_state(
    scheme, web, connector, monkeypatch, tmp_path, large
):
    CLOUDS[scheme](web, monkeypatch, tmp_path)
    states = []
    web.fault = lambda number, handler, answer: states.append(handler.headers.get("If-Match"))
    same(fetch(connector, f"{scheme}://slides/a.safetensors").selection, local(connector, tmp_path, large))
    assert len(states) >= N * D * 4 // PART_BYTES
    assert set(states[1:]) == {'"one"'}  # the first asks for the state


def test_a_transfer_that_breaks_in_the_middle_is_read_again(web, connector, monkeypatch, tmp_path, large):
    at(monkeypatch, base(web))

    def cut(number, handler, answer):
        if number in (3, 5):
            answer.cut = 100_000

    web.fault = cut
    same(fetch(connector, "s3://slides/a.safetensors").selection, local(connector, tmp_path, large))


def test_an_object_that_changes_between_two_ranges_is_no_mixture_but_a_422(web, connector, monkeypatch):
    at(monkeypatch, base(web))

    def change(number, handler, answer):
        if number == 4:
            web.data, web.etag = web.data[:-4] + b"\0\0\0\0", '"two"'

    web.fault = change
    with pytest.raises(VLLMUnprocessableEntityError, match=r"a\.safetensors: the file changed while it was read"):
        fetch(connector, "s3://slides/a.safetensors")
    web.fault = lambda *_: None
    assert fetch(connector, "s3://slides/a.safetensors").source == "file"


LIES = ["another ETag", "another place", "a shorter range", "all of it"]


def lie(how, number, answer, web):
    first, last = web.ranges_asked[number]
    if how == "another ETag":
        answer.headers["ETag"] = '"two"'
    if how == "another place":
        answer.headers["Content-Range"] = f"bytes 0-{last - first}/{len(web.data)}"
    if how == "a shorter range":
        answer.data = answer.data[:1000]
        answer.headers |= {"Content-Length": "1000", "Content-Range": f"bytes {first}-{first + 999}/{len(web.data)}"}
    if how == "all of it":
        answer.status, answer.data = 200, web.data
        answer.headers = {"Content-Length": str(len(web.data)), "ETag": web.etag}


@pytest.mark.parametrize("how", LIES)
def test_a_range_that_lies_is_not_believed_and_asked_for_again_or_refused(
    how, web, connector, monkeypatch, tmp_path, large
):
    at(monkeypatch, base(web))
    web.fault = lambda number, handler, answer: lie(how, number, answer, web) if number == 4 else None
    if how == "another ETag":
        with pytest.raises(VLLMUnprocessableEntityError, match='in the state "two", wanted'):
            fetch(connector, "s3://slides/a.safetensors")
    else:
        same(fetch(connector, "s3://slides/a.safetensors").selection, local(connector, tmp_path, large))


@pytest.mark.parametrize("how", LIES)
def test_a_store_whose_ranges_always_lie_is_a_422(how, web, connector, monkeypatch):
    at(monkeypatch, base(web))
    web.fault = lambda number, handler, answer: lie(how, number, answer, web) if number >= 2 else None
    with pytest.raises(VLLMUnprocessableEntityError, match=r"a\.safetensors: "):
        fetch(connector, "s3://slides/a.safetensors")
    assert len(web.ranges_asked) < 40


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_an_error_of_the_store_is_a_422_that_tells_no_address(status, web, connector, monkeypatch, caplog):
    at(monkeypatch, base(web))
    web.status = status
    web.body_status = status
    with (
        caplog.at_level("WARNING", logger="vllm.vllm_wsi"),
        pytest.raises(VLLMUnprocessableEntityError, match=r"a\.safetensors: ") as raised,
    ):
        fetch(connector, "s3://slides/a.safetensors")
    assert "127.0.0.1" not in str(raised.value)
    assert "secret" not in str(raised.value) + caplog.text


def test_a_store_that_is_silent_holds_up_no_slide_of_this_machine(connector, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "3")
    (tmp_path / "here.safetensors").write_bytes(slide(n=50))
    with socket.create_server(("127.0.0.1", 0), backlog=200) as silent:
        at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")

        async def ask():
            held = [asyncio.create_task(connector.fetch_image_async(f"s3://slides/{i}.h5")) for i in range(80)]
            await asyncio.sleep(0.5)
            found = await asyncio.wait_for(
                connector.fetch_image_async((tmp_path / "here.safetensors").as_uri()), timeout=60
            )
            others = sum(one.done() for one in held)
            for one in held:
                one.cancel()
            return found, others

        found, others = asyncio.run(ask())
    assert found.selection.num_patches == 50
    assert others < 80  # they still wait


def test_a_store_that_does_not_answer_is_a_422(connector, monkeypatch):
    at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(VLLMUnprocessableEntityError, match="see the server's log"):
        fetch(connector, "s3://slides/a.safetensors")
