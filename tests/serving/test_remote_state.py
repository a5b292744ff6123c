"""Slides on the web: which state a URL leads to, and that a known one is not fetched again. Real HTTP servers."""

import asyncio
import time
from functools import partial

import pytest
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.serving import vllm_hooks
from vllm_wsi.serving.connector import CONNECTOR
from vllm_wsi.serving.remote_state import state_by_headers, unsigned
from vllm_wsi.slides import SlideIdentity
from vllm_wsi.store.store_settings import StoreSettings

from .web_server import D, WebServer, body

OLD, NOW = "Sun, 01 Nov 2026 10:00:00 GMT", "Sun, 29 Nov 2026 10:00:00 GMT"


@pytest.fixture
def web():
    found = WebServer()
    yield found
    found.close()


@pytest.fixture
def connector(monkeypatch, tmp_path):
    return new_connector(monkeypatch, tmp_path, "a")


def new_connector(monkeypatch, tmp_path, name):
    """As a server has it that starts now, with the store of `tmp_path`."""
    monkeypatch.setattr(vllm_hooks, "_current", None)
    monkeypatch.setattr(vllm_hooks, "_services", {})
    weights = seeded_scorer("patch", D, 16, seed=0).requires_grad_(False).weights()
    vllm_hooks.service_for(SlideSelector(weights, 8), "scorer", 16, StoreSettings(tmp_path / "store", 1 << 30))
    return MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR)


def fetch(connector, url, how):
    if how == "now":
        return connector.fetch_image(url)
    return asyncio.run(fetch_and_close(connector, url))


async def fetch_and_close(connector, *urls):
    try:
        found = await asyncio.gather(*map(connector.fetch_image_async, urls))
        return found if len(urls) > 1 else found[0]
    finally:
        await (await connector.connection.get_async_client()).close()
        connector.connection._async_client = None  # of this event loop


@pytest.mark.parametrize("how", ["now", "awaited"])
def test_an_unchanged_slide_is_not_fetched_again_in_this_server_nor_after_a_restart(
    how, web, connector, monkeypatch, tmp_path
):
    first = fetch(connector, web.url, how)
    assert (first.source, web.asked["body"]) == ("file", 1)
    again = fetch(connector, f"{web.url}?X-Amz-Signature=other&X-Amz-Date=2", how)
    assert (again.source, again.digest) == ("memory", first.digest)
    restarted = fetch(new_connector(monkeypatch, tmp_path, "b"), web.url, how)
    assert restarted.source == "store"
    assert restarted.selection.features.equal(first.selection.features)
    assert web.asked["body"] == 1


def test_a_changed_slide_is_fetched_and_selected_anew(web, connector):
    first = fetch(connector, web.url, "awaited")
    web.data, web.etag = body(1), '"two"'
    second = fetch(connector, web.url, "awaited")
    assert web.asked["body"] == 2
    assert not second.selection.features.equal(first.selection.features)
    web.data, web.etag = body(0), '"one"'
    assert fetch(connector, web.url, "awaited").digest == first.digest
    assert web.asked["body"] == 2


def test_another_k_and_a_slide_of_another_query_are_other_selections(web, connector):
    assert len(fetch(connector, f"{web.url}#k=3", "awaited").selection.indices) == 3
    assert len(fetch(connector, f"{web.url}#k=5", "awaited").selection.indices) == 5
    fetch(connector, f"{web.url}?id=2#k=5", "awaited")
    assert web.asked["body"] == 3


def test_many_questions_about_a_new_slide_fetch_it_once(web, connector):
    found = asyncio.run(fetch_and_close(connector, *[web.url] * 16))
    assert web.asked["body"] == 1
    assert len({one.digest for one in found}) == 1


@pytest.mark.parametrize("missing", ["validator", "ranges and length", "state after"])
def test_a_server_that_tells_no_state_is_fetched_from_each_time_and_the_answer_is_right(missing, web, connector):
    if missing == "validator":
        web.etag, web.modified = 'W/"weak"', None
    if missing == "ranges and length":
        web.ranges, web.etag = False, None
    if missing == "state after":  # another node of the server's has other ETags

        def other_node():
            web.etag = f'"{len(web.asked)}{web.asked["body"]}"'

        web.before_body = other_node
    first, second = (fetch(connector, web.url, "awaited") for _ in range(2))
    assert web.asked["body"] == (4 if missing == "state after" else 2)  # a range of another state, then all of it
    assert first.selection.features.equal(second.selection.features)
    assert second.source == "memory"  # by its content


def test_a_slide_that_changes_between_headers_and_body_is_not_taken_for_the_state_of_the_headers(web, connector):
    def change():
        web.data, web.etag = body(1), '"two"'

    web.before_body = change
    changed = fetch(connector, web.url, "awaited")
    web.before_body = lambda: None
    web.data, web.etag = body(0), '"one"'
    first = fetch(connector, web.url, "awaited")
    assert web.asked["body"] == 3
    assert not first.selection.features.equal(changed.selection.features)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_an_error_of_the_server_is_told_as_it_was_before(status, web, connector, monkeypatch):
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    web.status = status
    with pytest.raises(VLLMUnprocessableEntityError, match=str(status)):
        fetch(connector, web.url, "awaited")


def test_a_fetch_that_fails_fails_at_once_for_all_who_wait(web, connector, monkeypatch):
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    web.body_status, web.before_body = 500, partial(time.sleep, 1)

    async def ask():
        try:
            return await asyncio.gather(
                *[connector.fetch_image_async(web.url) for _ in range(16)], return_exceptions=True
            )
        finally:
            await (await connector.connection.get_async_client()).close()
            connector.connection._async_client = None

    errors = asyncio.run(ask())
    assert {type(error) for error in errors} == {VLLMUnprocessableEntityError}
    assert web.asked["body"] == 2  # a range, then all of it


def test_bytes_of_vllms_media_cache_are_not_taken_for_the_servers_state(web, connector, monkeypatch, tmp_path):
    """It keeps bytes by their URL alone."""
    monkeypatch.setenv("VLLM_MEDIA_CACHE", str(tmp_path / "media"))
    connector = MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR)
    old = fetch(connector, web.url, "awaited")
    web.data, web.etag = body(1), '"two"'
    assert fetch(connector, web.url, "awaited").digest == old.digest  # as vLLM means it
    monkeypatch.delenv("VLLM_MEDIA_CACHE")
    new = fetch(MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR), web.url, "awaited")
    assert not new.selection.features.equal(old.selection.features)


def test_a_domain_that_is_not_allowed_is_not_even_asked(web, connector):
    connector.allowed_media_domains = ["example.org"]
    for how in ("now", "awaited"):
        with pytest.raises(ValueError, match="must be from one of the allowed domains"):
            fetch(connector, web.url, how)
    assert not web.asked


def state(status=206, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return state_by_headers("https://h/a", status, names)


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": 'W/"1"'}, {"ETag": "1"}, {"ETag": '""'}, {},
        {"Last_Modified": OLD}, {"Last_Modified": NOW, "Date": NOW}, {"Last_Modified": "x", "Date": NOW},
        {"Last_Modified": "Sun, 29 Nov 2026 09:59:01 GMT", "Date": NOW},
        {"ETag": '"1"', "Content_Range": "bytes 0-0/*"}, {"ETag": '"1"', "Content_Range": "bytes 0-9/10"},
        {"ETag": '"1"', "Content_Range": "bytes 0-0/-1"}, {"ETag": '"1"', "Content_Range": "bytes 0-0/" + "9" * 5000},
        {"ETag": '"1"', "Last_Modified": "Sun, 29 Nov 2026 09:59:01 GMT", "Date": NOW},  # made of seconds, perhaps
        {"Last_Modified": "Sun, 01 Nov 99999999999 10:00:00 GMT", "Date": NOW},
    ],
    ids=str,
)  # fmt: skip
def test_headers_that_tell_no_state(headers):
    assert state(**{"Content_Range": "bytes 0-0/10"} | headers) is None


def test_headers_that_tell_a_state():
    at, by_etag = "https://h/a", ("ETag", '"1"')
    identity = SlideIdentity(at, 10, content='ETag "1"')
    assert state(Content_Range="bytes 0-0/10", ETag='"1"') == (identity, by_etag, True)
    by_date = SlideIdentity(at, 10, content="Last-Modified 2026-11-01T10:00:00+00:00")
    found = state(Content_Range="bytes 0-0/10", Last_Modified=OLD, Date=NOW)
    assert found == (by_date, ("Last-Modified", OLD), True)
    assert state(200, Content_Length="10", ETag='"1"') == (identity, by_etag, False)
    assert state(200, Content_Length="10", ETag='"1"', Content_Encoding="gzip") is None
    assert state(200, Content_Length="", ETag='"1"') is None
    assert state(404, Content_Length="10", ETag='"1"') is None


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("HTTPS://Host.org:8443/a%20b?X-Amz-Signature=1&X-Amz-Date=2", "https://host.org:8443/a%20b"),
        ("https://h/slide?st=1&se=3", "https://h/slide?st=1&se=3"),  # Azure's names, and no signature of Azure's
        ("https://h/a?Signature=1&Expires=2", "https://h/a?Signature=1&Expires=2"),
        ("https://h/a?id=%ff", "https://h/a?id=%FF"),
        ("https://h/a?id=%fe&x=a+b", "https://h/a?id=%FE&x=a+b"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
        ("https://h/a?X-Goog-Signature=1&id=7", "https://h/a?id=7"),
        ("https://h/a?sv=2024&sig=x&se=y&sp=r&sr=b", "https://h/a"),
        ("https://h/a?Expires=1&Signature=2&Key-Pair-Id=3", "https://h/a"),
        ("https://h/a?versionId=3&v=", "https://h/a?versionId=3&v="),
        ("https://user:secret@h/a", "https://h/a"),
    ],
)
def test_what_signs_a_url_is_no_part_of_the_slides_name(url, wanted):
    assert unsigned(url) == wanted
