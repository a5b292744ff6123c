"""Slides on a web server, scored while they arrive: the same bits as from a file, and what servers do wrong."""

import asyncio
import threading
import time

import h5py
import numpy as np
import pytest
from safetensors.numpy import save
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from tests.slides.test_feature_formats import CASES, CONTIGUOUS, Case
from vllm_wsi.errors import FetchError, SlideError
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.serving import metrics, vllm_hooks
from vllm_wsi.serving.connector import CONNECTOR
from vllm_wsi.serving.http_ranges import HttpRanges
from vllm_wsi.serving.remote_bytes import AT_ONCE, NEAR_BYTES, PART_BYTES, RangesUnfit, RemoteBytes
from vllm_wsi.serving.remote_slide import RemoteSlide
from vllm_wsi.serving.spooled_slide import open_spooled
from vllm_wsi.slides import SlideIdentity, open_features
from vllm_wsi.slides.formats import hdf5_access
from vllm_wsi.store.store_settings import StoreSettings

from .web_server import Answer, D, WebServer

N = 80_000  # 20 MiB: three reads of the scorer, ten parts
K = 8


@pytest.fixture(scope="module")
def large():
    """The bytes of a slide whose best patches lie everywhere."""
    x = np.random.default_rng(3).standard_normal((N, D)).astype(np.float32)
    coords = np.stack([np.arange(N) % 300, np.arange(N) // 300], axis=1).astype(np.int32) * 256
    return save({"features": x, "coords": coords}, {"patch_size_level0": "256"})


@pytest.fixture
def web(large):
    found = WebServer(large)
    yield found
    found.close()


@pytest.fixture
def connector(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "3")
    monkeypatch.setattr(vllm_hooks, "_current", None)
    monkeypatch.setattr(vllm_hooks, "_services", {})
    weights = seeded_scorer("patch", D, 16, seed=0).requires_grad_(False).weights()
    vllm_hooks.service_for(SlideSelector(weights, K), "scorer", 16, StoreSettings(tmp_path / "store", 1 << 30))
    return MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR, allowed_local_media_path=str(tmp_path))


@pytest.fixture
def local(large, connector, tmp_path):
    """The selection of the same bytes as a file of this machine."""
    path = tmp_path / "local.safetensors"
    path.write_bytes(large)
    return connector.fetch_image(path.as_uri()).selection


def same(one, other):
    assert one.indices.tolist() == other.indices.tolist()
    assert one.features.equal(other.features)
    assert one.scores.equal(other.scores)
    assert np.array_equal(one.coords, other.coords)


def opened(web, encoder=None, seconds=20.0):
    """The slide of the server, by ranges alone."""
    size = len(web.data)
    transport = HttpRanges(HTTPConnection(), web.url, "a", size, ("ETag", web.etag))
    return RemoteSlide("a", SlideIdentity(web.url, size), transport, seconds).open(encoder)


def files(case: Case) -> bool:
    return "zarr" not in case.format  # a zarr store is a folder


def assert_same_slide(found, wanted):
    for name in ("num_patches", "feature_dim", "dtype", "unit", "format", "key", "metadata"):
        assert getattr(found, name) == getattr(wanted, name), name
    rows = [slide.read_rows(0, slide.num_patches) for slide in (found, wanted)]
    assert np.array_equal(*rows, equal_nan=True)
    coords = [slide.read_coords() for slide in (found, wanted)]
    assert coords[0] is coords[1] is None or np.array_equal(*coords)


@pytest.mark.parametrize("case", [case for case in CASES if files(case)], ids=lambda case: case.name)
def test_every_format_reads_over_http_and_by_value_as_it_reads_from_a_file(case, tmp_path):
    path = tmp_path / case.name
    case.write(path)
    web = WebServer(path.read_bytes())
    try:
        with open_features(path, case.encoder) as wanted, opened(web, case.encoder) as found:
            assert_same_slide(found, wanted)
            with open_spooled([path.read_bytes()], "a", found.identity, case.encoder) as by_value:
                assert_same_slide(by_value, wanted)
            by_ranges = case in CONTIGUOUS or case.format in ("safetensors", "npy") or case.name == "table.h5ad"
            assert isinstance(getattr(getattr(found.rows, "source", None), "_transport", None), HttpRanges) == by_ranges
    finally:
        web.close()


def test_places_in_units_of_their_own_are_scaled_once_by_value_too(tmp_path):
    """STAMP before 2.0 wrote microns of a scale of its own."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["feats"], file["coords"] = np.ones((4, D), np.float32), np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * 224
    identity = SlideIdentity("a", 1)
    with open_features(path) as wanted, open_spooled([path.read_bytes()], "a", identity, None) as found:
        assert wanted.unit.scale != 1
        assert_same_slide(found, wanted)


@pytest.mark.parametrize("how", ["now", "awaited"])
def test_a_slide_is_scored_as_it_arrives_by_several_requests_at_once(how, web, connector, local, large):
    def slowly(number, handler, answer):
        answer.pause = 0.05

    web.fault = slowly
    before = metrics.REMOTE_BYTES._value.get()
    found = connector.fetch_image(web.url) if how == "now" else fetch(connector, web.url)
    same(found.selection, local)
    assert found.source == "file"
    assert 2 <= web.most_at_once <= AT_ONCE
    assert all(last - first < PART_BYTES for first, last in web.ranges_asked)
    assert metrics.REMOTE_BYTES._value.get() - before < len(large) + 2 * NEAR_BYTES  # no byte of a row twice


def fetch(connector, *urls):
    async def ask():
        try:
            found = await asyncio.gather(*map(connector.fetch_image_async, urls), return_exceptions=True)
            for one in found:
                if isinstance(one, BaseException) and len(urls) == 1:
                    raise one
            return found if len(urls) > 1 else found[0]
        finally:
            await (await connector.connection.get_async_client()).close()
            connector.connection._async_client = None  # of this event loop

    return asyncio.run(ask())


def test_another_k_of_a_scored_slide_reads_its_kept_rows_alone(web, connector, large):
    first = fetch(connector, web.url)
    web.ranges_asked.clear()
    second = fetch(connector, f"{web.url}#k=3")
    assert (second.source, len(second.selection.indices)) == ("stored scores", 3)
    assert set(second.selection.indices.tolist()) <= set(first.selection.indices.tolist())
    asked = sum(last + 1 - first for first, last in web.ranges_asked)
    assert asked < 0.2 * len(large)


FAULTS = {}


def fault(function):
    FAULTS[function.__name__.replace("_", " ")] = function
    return function


@fault
def breaks_in_the_middle_once(number, answer, web):
    if number == 2:
        answer.cut = 100_000


@fault
def ends_before_a_byte_once(number, answer, web):
    if number == 3:
        answer.cut = 0


@fault
def is_too_busy_twice(number, answer, web):
    if number in (1, 4):
        answer.status, answer.data, answer.headers = 503, b"", {"Content-Length": "0"}


@fault
def asks_for_patience_once(number, answer, web):
    if number == 2:
        answer.status, answer.data, answer.headers = 429, b"", {"Content-Length": "0"}


@fault
def sends_less_than_was_asked_for(number, answer, web):
    """A whole answer, of a shorter range."""
    if number == 2:
        first = web.ranges_asked[number][0]
        answer.data = answer.data[:1000]
        answer.headers |= {"Content-Length": "1000", "Content-Range": f"bytes {first}-{first + 999}/{len(web.data)}"}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_transfer_that_breaks_is_resumed_and_the_bits_are_the_same(name, web, connector, local, large):
    web.fault = lambda number, handler, answer: FAULTS[name](number, answer, web)
    before = metrics.RANGES_GIVEN_UP._value.get()
    same(fetch(connector, web.url).selection, local)
    assert metrics.RANGES_GIVEN_UP._value.get() == before
    if name == "breaks in the middle once":  # what came is not asked for again
        first, last = web.ranges_asked[2]
        assert (first + 100_000, last) in web.ranges_asked


UNFIT = {
    "the place of its first byte": {"Content-Range": "bytes 7-{last}/{size}"},
    "the place of its last byte": {"Content-Range": "bytes {first}-{size}/{size}"},
    "the length of the whole": {"Content-Range": "bytes {first}-{last}/99"},
    "no place": {"Content-Range": None},
    "the length of this part": {"Content-Length": "3"},
    "another ETag": {"ETag": '"two"'},
    "no ETag": {"ETag": None},
    "a packed body": {"Content-Encoding": "gzip"},
}


@pytest.mark.parametrize("lie", list(UNFIT))
def test_a_range_that_lies_is_not_believed_and_the_slide_is_fetched_whole(lie, web, connector, local, caplog):
    def tell(number, handler, answer):
        if number == 2:
            first, last = web.ranges_asked[number]
            for name, value in UNFIT[lie].items():
                answer.headers[name] = value and value.format(first=first, last=last, size=len(web.data))

    web.fault = tell
    before = metrics.RANGES_GIVEN_UP._value.get()
    with caplog.at_level("WARNING", logger="vllm.vllm_wsi"):
        same(fetch(connector, web.url).selection, local)
    assert metrics.RANGES_GIVEN_UP._value.get() == before + 1
    assert "it is fetched whole" in caplog.text


def test_a_server_that_stops_giving_ranges_is_fetched_from_whole(web, connector, local):
    def all_of_it(number, handler, answer):
        if number:
            answer.status, answer.data = 200, web.data
            answer.headers = {"Content-Length": str(len(web.data)), "ETag": web.etag}

    web.fault = all_of_it
    same(fetch(connector, web.url).selection, local)


def test_a_body_longer_than_its_range_is_not_believed(web, connector, local):
    def longer(number, handler, answer):
        if number == 2:
            del answer.headers["Content-Length"]
            answer.data += b"more"

    web.fault = longer
    same(fetch(connector, web.url).selection, local)


def test_a_slide_that_changes_between_two_ranges_is_never_a_mixture(web, connector, large):
    other = bytearray(large)
    other[-4 * D * 1000 :] = other[: 4 * D * 1000]

    def change(number, handler, answer):
        if number == 3:
            web.data, web.etag = bytes(other), '"two"'

    web.fault = change
    found = fetch(connector, web.url)
    web.fault = lambda *_: None
    again = fetch(connector, web.url)  # of the new state
    same(found.selection, again.selection)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_slide_that_is_gone_in_the_middle_is_a_422_with_the_status(status, web, connector):
    def gone(number, handler, answer):
        if number >= 2:
            answer.status, answer.data, answer.headers = status, b"", {"Content-Length": "0"}

    web.fault = gone
    with pytest.raises(VLLMUnprocessableEntityError, match=f"a.safetensors: found HTTP {status}"):
        fetch(connector, web.url)


def broken_part(how, web):
    def broken(number, handler, answer):
        if web.ranges_asked[number][0] >= PART_BYTES:
            if how == "cut":
                answer.cut = 0
            else:
                answer.status, answer.data, answer.headers = how, b"", {"Content-Length": "0"}

    return broken


@pytest.mark.parametrize("how", ["cut", 500, 503, 429, 400, 501])
def test_where_ranges_never_come_the_slide_is_fetched_whole_after_a_bounded_number_of_tries(how, web, connector, local):
    web.fault = broken_part(how, web)
    same(fetch(connector, web.url).selection, local)
    assert len(web.ranges_asked) < 40


def test_a_server_that_gives_nothing_is_a_422_after_a_bounded_number_of_tries(web, connector):
    web.body_status = 500
    with pytest.raises(VLLMUnprocessableEntityError, match="500"):
        fetch(connector, web.url)
    assert len(web.ranges_asked) < 10


@pytest.mark.parametrize("most", [50_000, 512 << 10])
def test_a_server_that_gives_little_at_once_is_asked_on_without_a_pause(most, web, connector, local):
    def little(number, handler, answer):
        first, _ = web.ranges_asked[number]
        if len(answer.data) > most:
            answer.data = answer.data[:most]
            place = f"bytes {first}-{first + most - 1}/{len(web.data)}"
            answer.headers |= {"Content-Length": str(most), "Content-Range": place}

    web.fault = little
    before = metrics.RANGES_GIVEN_UP._value.get()
    same(fetch(connector, web.url).selection, local)
    assert metrics.RANGES_GIVEN_UP._value.get() == before


def test_a_server_of_one_connection_for_each_client_is_read_too(web, connector, local):
    def one_at_once(number, handler, answer):
        answer.pause = 0.02
        if web.at_once > 1:
            answer.status, answer.data, answer.headers = 503, b"", {"Content-Length": "0"}

    web.fault = one_at_once
    same(fetch(connector, web.url).selection, local)


@pytest.mark.parametrize("target", ["http://a..b/", "http://[::1/x", "ftp://h/a", "http://127.0.0.1:1/a"])
def test_a_redirect_that_leads_nowhere_is_a_422_that_names_no_other_host(target, web, connector, monkeypatch):
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")

    def elsewhere(number, handler, answer):
        if number == 2:
            answer.status, answer.data, answer.headers = 302, b"", {"Location": target, "Content-Length": "0"}

    web.fault = elsewhere
    found = fetch(connector, web.url)  # the whole slide, which this server gives
    assert found.source == "file"


def test_a_slow_server_holds_up_its_own_request_alone(web, connector, monkeypatch, tmp_path, large):
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "2")
    (tmp_path / "here.safetensors").write_bytes(large)
    other = WebServer(large)

    def drip(number, handler, answer):
        answer.piece, answer.pause = 1, 0.3

    web.fault = drip
    try:
        slow = threading.Thread(target=lambda: results.append(failure(connector, web.url)))
        results = []
        slow.start()
        time.sleep(0.2)
        assert connector.fetch_image((tmp_path / "here.safetensors").as_uri()).source == "file"
        assert connector.fetch_image(other.url).source == "file"
        assert slow.is_alive()
        slow.join()
    finally:
        other.close()
    assert "in time" in results[0]


def failure(connector, url):
    try:
        return connector.fetch_image(url)
    except VLLMUnprocessableEntityError as error:
        return str(error)


@pytest.mark.parametrize("allowed", ["1", "0"])
def test_redirects_are_followed_as_vllm_is_told(allowed, web, connector, local, monkeypatch):
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", allowed)
    elsewhere = WebServer(web.data)

    redirect = Answer(302, {"Location": web.url, "Content-Length": "0"}, b"")
    elsewhere.answer = lambda handler: elsewhere._send(handler, redirect)
    try:
        if allowed == "1":
            same(fetch(connector, elsewhere.url).selection, local)
            assert len(web.ranges_asked) > 3
        else:
            with pytest.raises((VLLMUnprocessableEntityError, SlideError)):
                fetch(connector, elsewhere.url)
            assert not web.asked
    finally:
        elsewhere.close()


def test_what_came_counts_towards_vllms_bound_for_one_request(web, connector):
    """`download_budget` is vLLM 0.33's."""

    class Budget:
        used = 0

        def charge(self, size):
            self.used += size
            if self.used > 4 << 20:
                raise ValueError("Request media downloads exceed the bound")

    connector.download_budget = Budget()
    with pytest.raises(VLLMUnprocessableEntityError, match="exceed the bound"):
        fetch(connector, web.url)
    assert connector.download_budget.used < 8 << 20


def test_metadata_behind_the_features_and_packed_coordinates_of_an_h5_come_by_ranges(tmp_path):
    path = tmp_path / "a.h5"
    x = np.random.default_rng(0).standard_normal((20_000, D)).astype(np.float32)
    coords = np.stack([np.arange(20_000), np.arange(20_000) // 7], axis=1)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=x)
        file.create_dataset("coords", data=coords, chunks=(1000, 2), compression="gzip")
        file["coords"].attrs.update({"patch_size_level0": 256, "patch_size": 256})
    web = WebServer(path.read_bytes())
    try:
        with opened(web) as slide:
            assert np.array_equal(slide.read_rows(10_000, 10_100), x[10_000:10_100])
            assert np.array_equal(slide.read_coords(), coords)
            assert slide.metadata["patch_size_level0"] == "256"
        assert sum(last + 1 - first for first, last in web.ranges_asked) < len(web.data) / 2
    finally:
        web.close()


def test_an_h5_whose_coordinates_lie_in_too_many_pieces_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_access, "MAX_PIECES", 12)
    path = tmp_path / "a.h5"
    x = np.random.default_rng(0).standard_normal((2000, D)).astype(np.float32)
    coords = np.stack([np.arange(2000), np.arange(2000) // 7], axis=1)
    with h5py.File(path, "w", alignment_threshold=1, alignment_interval=hdf5_access.PIECE_BYTES) as file:
        file["features"] = x
        file.create_dataset("coords", data=coords, chunks=(100, 2))
    web = WebServer(path.read_bytes())
    try:
        with opened(web) as slide:
            assert np.array_equal(slide.read_coords(), coords)
            assert np.array_equal(slide.read_rows(0, 2000), x)
            assert slide.name == "a"
    finally:
        web.close()


@pytest.mark.parametrize("size", [0, 1, NEAR_BYTES - 1, NEAR_BYTES, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES])
def test_any_range_is_what_lies_there(size, web):
    transport = HttpRanges(HTTPConnection(), web.url, "a", len(web.data), ("ETag", web.etag))
    source = RemoteBytes("a", len(web.data), transport, 10.0, 1)
    for offset in (0, 5, len(web.data) - size, 5 + size):
        out = bytearray(size)
        source.read_into(offset, memoryview(out))
        assert out == web.data[offset : offset + size]
    with pytest.raises(SlideError, match="found its end"):
        source.read_into(len(web.data) - size, memoryview(bytearray(size + 1)))
    source.close()


def test_a_state_that_is_gone_is_told_by_the_server(web):
    transport = HttpRanges(HTTPConnection(), web.url, "a", len(web.data), ("ETag", '"old"'))
    source = RemoteBytes("a", len(web.data), transport, 10.0, 3)
    with pytest.raises(RangesUnfit, match="changed while it was read"):
        source.read_into(0, memoryview(bytearray(10)))
    assert issubclass(RangesUnfit, FetchError)
    assert len(web.ranges_asked) == 1
