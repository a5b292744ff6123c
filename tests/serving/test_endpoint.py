"""The endpoint plugin on a real `vllm serve` with an API key, asked by plain HTTP."""

import io
import itertools
import json
import os
import shutil
from pathlib import Path

import h5py
import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from vllm_wsi.encoding.png import write_png
from vllm_wsi.rendering.pictures import INFERNO
from vllm_wsi.serving.viewer.page import FOLDER
from vllm_wsi.slides import open_features, write_features

from ..slides import feature_stores as stores
from .conftest import KEY, make_slide, slide_message
from .grid_slides import CELL, COLUMNS, grid_colour, make_grid_image, make_grid_slide, make_real_slide, random_features

pytestmark = pytest.mark.server
ROUTES = ["slides", "slide?url=x", "qc.png?url=x", "tile?url=x&level=1&x=0&y=0", "heatmap.png?url=x", "select"]
ROUTES += ["region?url=x&x=0&y=0&width=1&height=1"]


@pytest.fixture(scope="module")
def media(shared_folder, tmp_path_factory) -> Path:
    """Slides with and without images and places, and what must not be shown."""
    folder = shared_folder / "endpoint"
    folder.mkdir()
    outside = tmp_path_factory.mktemp("outside")
    make_grid_slide(folder)
    (folder / "deep").mkdir()
    np.save(folder / "deep" / "no-places.npy", random_features(50, 7))
    make_slide(folder / "no-size.safetensors", 1)
    with h5py.File(folder / "microns.h5", "w") as file:  # as STAMP writes them
        file["feats"] = random_features(40, 8)
        file["coords"] = np.stack(np.divmod(np.arange(40), 8), axis=1)[:, ::-1] * 100.0
        file.attrs.update({"unit": "um", "tile_size_um": 100.0})
    make_slide(folder / ".hidden.safetensors", 10)
    make_slide(outside / "linked.safetensors", 10)
    (folder / "out.safetensors").symlink_to(outside / "linked.safetensors")
    make_slide(folder / "out-image.safetensors", 10)
    (folder / "out-image.tiff").symlink_to(make_grid_image(outside / "secret.tiff"))
    (folder / "loop.h5").symlink_to(folder / "loop.h5")
    make_slide(folder / "broken.safetensors", 10)
    (folder / "broken.svs").write_bytes(b"II*\0 no slide at all")
    return folder


@pytest.fixture
def server(shared_server):
    return shared_server


@pytest.fixture(scope="module")
def http(shared_server):
    base_url, headers = f"{shared_server.api}/wsi/", {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=base_url, headers=headers, timeout=120) as client:
        yield client


@pytest.fixture
def grid(media) -> str:
    return (media / "grid.safetensors").as_uri()


def refusal(answer: httpx.Response) -> str:
    """The sentence of a 4xx."""
    assert 400 <= answer.status_code < 500, answer.text
    message = answer.json()["error"]["message"]
    assert "\n" not in message
    return message


def picture(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def close(found: np.ndarray, wanted: tuple[int, ...]) -> bool:
    return bool(np.abs(found.astype(int) - np.array(wanted)).max() <= 6)  # JPEG


def test_a_selection_comes_with_its_rectangles(http, grid):
    found = http.post("select", json={"url": grid}).json()
    assert found["num_selected"] == 32
    assert found["rects"] == [[x, y, CELL, CELL] for x, y in found["coords"]]
    assert (found["extent_px"], found["encoder"]) == ([2000, 1600], "test@1")
    assert "rects_missing" not in found


def test_a_selection_without_places_says_so_and_has_no_geojson(http, media):
    url = (media / "deep" / "no-places.npy").as_uri()
    found = http.post("select", json={"url": url}).json()
    assert (found["num_selected"], found["rects"]) == (32, None)
    assert found["rects_missing"].startswith("no-places.npy: coords: found none")
    for answer in (
        http.post("select", params={"format": "geojson"}, json={"url": url}),
        http.get("heatmap.png", params={"url": url}),
    ):
        assert "no-places.npy: coords: found none" in refusal(answer)


def test_what_the_file_does_not_say_can_be_given(http, media):
    one = {"url": (media / "no-size.safetensors").as_uri()}
    assert "patch_size_level0: found none" in http.post("select", json=one).json()["rects_missing"]
    found = http.post("select", json=one | {"patch_size_level0": 64}).json()
    assert (found["rects"], found["patch_size"]["source"]) == ([[0, 0, 64, 64]], "given")
    microns = {"url": (media / "microns.h5").as_uri()}
    assert "mpp: found none" in http.post("select", json=microns).json()["rects_missing"]
    found = http.post("select", json=microns | {"mpp": 0.5}).json()
    assert found["rects"] == [[2 * x, 2 * y, 200, 200] for x, y in found["coords"]]
    for odd in ({"mpp": 0}, {"mpp": -1}, {"patch_size_level0": "wide"}, {"mpp": 1e999}, {"size": 3}):
        answer = http.post("select", content=_json(microns | odd), headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), odd


def _json(body: dict) -> str:
    import json

    return json.dumps(body)  # httpx refuses Infinity, which a server must stand


def test_microns_are_placed_by_the_images_own_mpp(http, media):
    shutil.copyfile(media / "microns.h5", media / "both.h5")
    make_grid_image(media / "both.tiff")  # 0.5 microns a pixel
    found = http.post("select", json={"url": (media / "both.h5").as_uri()}).json()
    assert np.allclose(found["rects"], [[2 * x, 2 * y, 200, 200] for x, y in found["coords"]])


def test_microns_are_not_placed_by_an_image_whose_pixels_are_not_square(http, media):
    shutil.copyfile(media / "microns.h5", media / "oblong.h5")
    make_grid_image(media / "oblong.tiff", resolution=(20_000, 30_000))
    url = (media / "oblong.h5").as_uri()
    assert "mpp: found none" in http.post("select", json={"url": url}).json()["rects_missing"]
    found = http.get("slide", params={"url": url}).json()
    assert (found["mpp"], found["has_image"], found["extent_px"]) == (None, True, [2000, 1600])


def test_a_scale_so_small_that_no_place_is_finite_is_no_failure_of_the_server(http, media):
    tiny = {"url": (media / "microns.h5").as_uri(), "mpp": 1e-320}
    assert "coords: found a place that is not finite" in http.post("select", json=tiny).json()["rects_missing"]
    assert "not finite" in refusal(http.post("select", params={"format": "geojson"}, json=tiny))


def test_geojson_holds_the_same_rectangles(http, grid):
    found = http.post("select", json={"url": grid}).json()
    answer = http.post("select", params={"format": "geojson"}, json={"url": grid})
    assert answer.headers["content-type"] == "application/geo+json"
    features = answer.json()["features"]
    assert len(features) == 32
    for feature, (x, y, w, h), score in zip(features, found["rects"], found["scores"], strict=True):
        (ring,) = feature["geometry"]["coordinates"]
        assert ring == [[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]
        assert feature["properties"]["measurements"]["score"] == score
    assert http.post("select", params={"format": "xml"}, json={"url": grid}).status_code in (400, 422)


def test_the_heat_map_shows_every_score_in_its_place_and_scores_once(http, server, media):
    url = make_grid_slide(media, "heated").as_uri()
    chosen = http.post("select", json={"url": url}).json()
    before = server.metrics()["vllm_wsi:selections_total"]
    answer = http.get("heatmap.png", params={"url": url, "overlay": 1})
    heat = picture(answer)
    scale = heat.shape[1] / 2000
    assert heat.shape[2] == 4
    assert abs(heat.shape[0] - 1600 * scale) <= 1
    x, y = chosen["coords"][int(np.argmax(chosen["scores"]))]
    assert heat[int((y + 100) * scale), int((x + 100) * scale)].tolist() == [*INFERNO[-1].tolist(), 255]
    assert heat[int(100 * scale), int(100 * scale), 3] == 0  # the margin
    assert (heat[int(300 * scale) :: int(CELL * scale), int(300 * scale) :: int(CELL * scale), 3] == 255).sum() == 48
    for overlay in (1, 0, 0):
        again = http.get("heatmap.png", params={"url": url, "overlay": overlay})
    assert server.metrics()["vllm_wsi:selections_total"] == before + 1
    assert picture(again).shape == (1638, 2048, 3)
    known = {"If-None-Match": answer.headers["etag"]}
    assert http.get("heatmap.png", params={"url": url, "overlay": 1}, headers=known).status_code == 304


def test_a_slide_without_an_image_has_its_heat_map_on_grey(http, media):
    path = media / "bare.safetensors"
    write_features(path, random_features(2, 1), np.array([(0, 0), (300, 100)]), {"patch_size_level0": "100"})
    heat = picture(http.get("heatmap.png", params={"url": path.as_uri()}))
    assert heat.shape == (1024, 2048, 3)
    assert heat[900, 1000].tolist() == [245, 245, 245]


def test_one_patch_as_large_as_the_slide_is_drawn_at_once(http, media):
    path = media / "giant.safetensors"
    write_features(path, random_features(1, 1), np.array([(0, 0)]), {"patch_size_level0": "100000"})
    assert picture(http.get("heatmap.png", params={"url": path.as_uri(), "overlay": 1})).shape == (2048, 2048, 4)


def test_every_format_on_disk_gives_the_selection_of_the_same_features(http, media):
    folder = media / "formats"
    folder.mkdir()
    features, coords = random_features(300, 9), np.stack(np.divmod(np.arange(300), 20), axis=1) * 256
    note = {"patch_size_level0": 256.0}
    write_features(folder / "a.safetensors", features, coords, {"patch_size_level0": "256.0"})
    np.savez_compressed(folder / "b.npz", features=features, coords=coords, **note)
    torch.save({"feats": torch.from_numpy(features), "coords": torch.from_numpy(coords), **note}, folder / "c.pt")
    stores.zarr_group(folder / "d.zarr", {"features": features, "coords": coords}, chunks=(70, 20)).attrs.update(note)
    stores.spatial_zarr(folder / "e.zarr", {"test": features, "conch": features * 0}, coords, np.arange(300)[::-1], 256)
    answers = []
    for url in [
        path.as_uri() + ("#encoder=test" if path.name == "e.zarr" else "") for path in sorted(folder.iterdir())
    ]:
        response = http.post("select", json={"url": url})
        assert response.status_code == 200, response.text
        answers.append({key: response.json()[key] for key in ("indices", "scores", "rects")})
    assert len(answers) == 5
    assert answers[1:] == answers[:1] * 4
    listed = {slide["name"] for slide in http.get("slides").json()["slides"]}
    assert {f"endpoint/formats/{name}" for name in ("b.npz", "c.pt", "d.zarr", "e.zarr")} <= listed
    assert not [name for name in listed if ".zarr/" in name]
    several = http.post("select", json={"url": (folder / "e.zarr").as_uri()})
    assert (several.status_code, "wanted one choice among them (#encoder=NAME)" in several.text) == (400, True)


def test_a_store_is_selected_anew_when_it_changes(http, media):
    path = media / "changing.zarr"
    features = random_features(50, 1)
    rounds = []
    for values in (features, features[::-1].copy()):
        stores.zarr_group(path, {"features": values})
        rounds.append(http.post("select", json={"url": path.as_uri()}).json()["indices"])
    assert rounds[1] == sorted(49 - row for row in rounds[0])


def test_slides_are_listed_with_what_they_have_and_nothing_from_elsewhere(http, media):
    found = http.get("slides").json()
    has_image = {slide["name"]: slide["has_image"] for slide in found["slides"]}
    assert has_image["endpoint/grid.safetensors"] is True
    assert has_image["endpoint/deep/no-places.npy"] is False
    assert has_image["endpoint/out-image.safetensors"] is False
    assert not {"endpoint/.hidden.safetensors", "endpoint/out.safetensors"} & set(has_image)
    assert list(has_image) == sorted(has_image)
    assert not found["truncated"]
    by_name = {slide["name"]: slide["url"] for slide in found["slides"]}
    assert by_name["endpoint/grid.safetensors"] == (media / "grid.safetensors").as_uri()


def test_a_slide_is_described(http, grid, media):
    found = http.get("slide", params={"url": grid}).json()
    tiles = found.pop("tiles")
    assert found == {
        "name": "grid.safetensors", "num_patches": 48, "encoder": "test@1", "extent_px": [2000, 1600], "mpp": 0.5,
        "has_image": True, "hears_questions": False, "guesses": [], "has_qc": False, "remarks": [],
    }  # fmt: skip
    assert (tiles["size_px"], tiles["min_level"], tiles["max_level"]) == (512, 9, 11)
    found = http.get("slide", params={"url": (media / "microns.h5").as_uri()}).json()
    assert (found["has_image"], found["extent_px"]) == (False, None)
    assert ["image" in remark or "mpp" in remark for remark in found["remarks"]] == [True, True]


def test_an_image_of_another_size_than_the_features_say_is_remarked_upon(http, media):
    path = make_grid_slide(media, "stranger", width="5000", height="4000")
    (remark,) = http.get("slide", params={"url": path.as_uri()}).json()["remarks"]
    assert "found 2000 x 1600 px, wanted 5000 x 4000" in remark


def test_tiles_show_the_pixels_of_their_place(http, grid):
    for level, scale in ((11, 1), (10, 2), (9, 4)):
        tiles = itertools.product(range(-(-2000 // (512 * scale))), range(-(-1600 // (512 * scale))))
        whole = np.zeros((1600 // scale, 2000 // scale, 3), np.uint8)
        for x, y in tiles:
            part = picture(http.get("tile", params={"url": grid, "level": level, "x": x, "y": y}))
            whole[y * 512 : y * 512 + part.shape[0], x * 512 : x * 512 + part.shape[1]] = part
        for column, row in itertools.product(range(COLUMNS), range(6)):
            middle = whole[(row * CELL + 300) // scale, (column * CELL + 300) // scale]
            assert close(middle, grid_colour(column, row)), (level, column, row)


def test_a_region_shows_one_patch(http, grid):
    where = {"url": grid, "x": 3 * CELL, "y": 2 * CELL, "width": CELL, "height": CELL, "side": 64}
    found = picture(http.get("region", params=where))
    assert found.shape == (64, 64, 3)
    assert close(found[32, 32], grid_colour(2, 1))
    for odd in ({"x": 5000}, {"width": 0}, {"height": -3}, {"side": 5000}, {"x": "nan"}, {"width": 1e12}):
        assert http.get("region", params=where | odd).status_code in (400, 422), odd


def test_a_tile_is_sent_once_and_kept_where_its_version_is_named(http, grid):
    version = http.get("slide", params={"url": grid}).json()["tiles"]["version"]
    where = {"url": grid, "level": 10, "x": 0, "y": 0}
    first = http.get("tile", params=where | {"version": version})
    assert "immutable" in first.headers["cache-control"]
    assert first.headers["cache-control"].startswith("private")
    for params in (where, where | {"version": "another"}):
        answer = http.get("tile", params=params, headers={"If-None-Match": first.headers["etag"]})
        assert (answer.status_code, answer.content) == (304, b"")
        assert "no-cache" in answer.headers["cache-control"]


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ({"level": 8}, "level: found 8, wanted 9 .. 11"),
        ({"level": 12}, "level: found 12"),
        ({"x": 4}, "tile: found 4, 0 at level 11, wanted 0 .. 3"),
        ({"y": -1}, "tile: found 0, -1"),
        ({"url": "data:x;base64,AAAA"}, "wanted a file:// URL"),
        ({"url": "https://example.org/a.h5"}, "wanted a file:// URL"),
        ({"url": "nonsense"}, "wanted a file:// URL"),
        ({"url": "{media}/loop.h5"}, "loop.h5: found a loop of links"),
        ({"url": "{media}/a%00b.h5"}, "null byte"),
        ({"url": "{media}/" + "long" * 200}, "File name too long"),
    ],
)
def test_a_tile_that_is_not_there_is_refused(http, grid, media, where, sentence):
    where = {key: value.format(media=media.as_uri()) if key == "url" else value for key, value in where.items()}
    assert sentence in refusal(http.get("tile", params={"url": grid, "level": 11, "x": 0, "y": 0} | where))


def test_tiles_of_a_slide_outside_the_allowed_path_are_refused(http, media, shared_folder, tmp_path):
    outside = make_grid_slide(tmp_path, "elsewhere")
    by_dots = shared_folder / Path(os.path.relpath(outside, shared_folder))
    assert by_dots.is_file()
    for url in (outside.as_uri(), f"file://{by_dots}", "file:///etc/passwd"):
        for route in ("tile", "slide", "heatmap.png", "region", "qc.png"):
            more = {"level": 11, "x": 0, "y": 0, "width": 9, "height": 9}
            assert "allowed-local-media-path" in refusal(http.get(route, params={"url": url} | more))
    linked = {"url": (media / "out-image.safetensors").as_uri(), "level": 11, "x": 0, "y": 0}
    assert "found a link out of --allowed-local-media-path" in refusal(http.get("tile", params=linked))
    assert "found a link out" in http.get("slide", params={"url": linked["url"]}).json()["remarks"][0]


def test_the_picture_of_tissue_and_patches_is_shown_where_it_lies_beside_the_features(http, media):
    path = make_grid_slide(media, "checked")
    drawn = path.with_suffix(".qc.png")
    where = {"url": path.as_uri()}
    assert "found no picture of tissue and patches" in refusal(http.get("qc.png", params=where))
    write_png(drawn, np.full((3, 5, 3), 77, np.uint8))
    assert http.get("slide", params=where).json()["has_qc"] is True
    answer = http.get("qc.png", params=where)
    assert (answer.headers["content-type"], answer.headers["x-content-type-options"]) == ("image/png", "nosniff")
    assert np.array_equal(picture(answer), np.full((3, 5, 3), 77))
    again = http.get("qc.png", params=where, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("kind", ["link", "text", "large"])
def test_what_only_has_the_name_of_such_a_picture_is_not_shown(http, media, tmp_path, kind):
    path = make_grid_slide(media, f"unchecked-{kind}")
    drawn, secret = path.with_suffix(".qc.png"), tmp_path / "secret.png"
    write_png(secret, np.zeros((3, 5, 3), np.uint8))
    if kind == "link":
        drawn.symlink_to(secret)
    else:
        drawn.write_bytes(b"<script>alert(1)</script>" if kind == "text" else b"\x89PNG\r\n\x1a\n")
        os.truncate(drawn, 25 if kind == "text" else (32 << 20) + 1)
    wanted = {"link": "found a link out of", "text": "found no PNG file", "large": "wanted at most 33554432"}
    message = refusal(http.get("qc.png", params={"url": path.as_uri()}))
    assert wanted[kind] in message
    assert str(media) not in message
    assert http.get("slide", params={"url": path.as_uri()}).json()["has_qc"] is (kind != "link")


def test_a_broken_image_takes_nothing_but_itself_away(http, media):
    url = (media / "broken.safetensors").as_uri()
    message = refusal(http.get("tile", params={"url": url, "level": 0, "x": 0, "y": 0}))
    assert message.startswith("broken.svs: found")
    found = http.get("slide", params={"url": url}).json()
    assert (found["has_image"], found["tiles"], found["num_patches"]) == (False, None, 10)
    assert found["remarks"][0].startswith("broken.svs: found")
    assert http.post("select", json={"url": url}).json()["num_selected"] == 10


def test_pixels_that_turn_out_damaged_are_refused_and_a_mended_image_is_read_anew(http, media):
    path = make_grid_slide(media, "damaged")
    image = path.with_suffix(".tiff")
    whole = image.read_bytes()
    where = {"url": path.as_uri(), "level": 9, "x": 0, "y": 0}
    assert http.get("tile", params=where).status_code == 200
    image.write_bytes(whole[: len(whole) // 2])
    refusal(http.get("tile", params=where))
    image.write_bytes(whole)
    assert http.get("tile", params=where).status_code == 200


def test_every_route_below_v1_asks_for_the_key(server):
    for route in ROUTES:
        method = "POST" if route == "select" else "GET"
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = httpx.request(method, f"{server.api}/wsi/{route}", headers=headers)
            assert answer.status_code == 401, route


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(server):
    assert httpx.get(f"{server.root}/wsi", follow_redirects=True).url.path == "/wsi/"
    page = httpx.get(f"{server.root}/wsi/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "http" not in page.text
    for name, kind in (("main.js", "text/javascript"), ("viewer.css", "text/css"), ("icon.svg", "image/svg+xml")):
        assert httpx.get(f"{server.root}/wsi/{name}").headers["content-type"].startswith(kind)
    outside = ("%2e%2e/endpoint.py", "vendor/../../endpoint.py", "%2e%2e/viewer_page.py")
    for name in (*outside, "nosuch.js", "vendor", "vendor.js/", "%00.html", f"{'a' * 300}.html"):
        assert httpx.get(f"{server.root}/wsi/{name}").status_code in (401, 404)  # 401 where the client left /wsi/ first


def test_every_file_of_the_viewer_is_served_its_licences_too(server):
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert any("LICENSE" in path.name for path in files)
    for path in files:
        answer = httpx.get(f"{server.root}/wsi/{path.relative_to(FOLDER).as_posix()}")
        assert (answer.status_code, answer.content) == (200, path.read_bytes()), path


def test_chat_and_viewer_share_one_selection_and_the_counters_tell(http, server, media):
    url = make_slide(media / "counted.safetensors", 70).as_uri()

    def count(name):
        return server.metrics().get(f"vllm_wsi:{name}_total", 0)

    def timed():
        metrics = server.metrics()
        return [metrics.get(f"vllm_wsi:{name}_seconds_count", 0) for name in ("read", "score", "selection")]

    before, timed_before = [count(name) for name in ("selections", "patches_read", "selection_cache_hits")], timed()
    body = {"model": server.model, "messages": slide_message(url), "max_tokens": 2}
    chat = httpx.post(
        f"{server.api}/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    )
    assert chat.status_code == 200
    http.post("select", json={"url": url})
    after = [count(name) for name in ("selections", "patches_read", "selection_cache_hits")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 70, 1]
    assert [b - a for a, b in zip(timed_before, timed(), strict=True)] == [1, 1, 1]
    metrics = server.metrics()
    assert metrics["vllm_wsi:selection_cache_slides"] >= 1
    assert metrics["vllm_wsi:selection_cache_bytes"] > 70 * 4
    assert (metrics["vllm_wsi:selections_queued"], metrics["vllm_wsi:selections_running"]) == (0, 0)


def test_the_real_slide_is_shown(http, media, shared_data):
    url = make_real_slide(media, shared_data).as_uri()
    found = http.get("slide", params={"url": url}).json()
    assert (found["extent_px"], found["has_image"], found["mpp"]) == ([2220, 2967], True, 0.499)
    level = found["tiles"]["min_level"]
    overview = picture(http.get("tile", params={"url": url, "level": level, "x": 0, "y": 0}))
    assert overview.shape == (371, 278, 3)
    assert np.ptp(overview, axis=2).max() > 100  # stained tissue


@pytest.mark.parametrize("named", [None, "", "another", "vllm_wsi", "another,vllm_wsi"])
def test_the_routes_are_there_only_where_the_plugin_is_named(monkeypatch, named):
    from vllm.plugins import load_endpoint_plugins

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if named is not None:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    found = {plugin.name for plugin in load_endpoint_plugins(("generate",))}
    assert ("vllm_wsi" in found) == ("vllm_wsi" in (named or "").split(","))


@pytest.fixture
def guessed(media) -> Path:
    """The grid slide as a file that says nothing of its places, which a `feats` file may do."""
    path, image = media / "guessed.h5", media / "guessed.tiff"
    if not path.exists():
        with h5py.File(path, "w") as file:
            file["feats"] = random_features(COLUMNS * 6, 5)
            file["coords"] = np.array([((x + 1) * CELL, (y + 1) * CELL) for y in range(6) for x in range(COLUMNS)])
        make_grid_image(image)
    return path


def test_a_guessed_place_is_called_that_and_drawn_upon_the_slide_only_when_it_is_accepted(http, guessed):
    url = guessed.as_uri()
    record = http.post("select", json={"url": url}).json()
    assert (record["coord_unit_source"], record["patch_size"]["source"]) == ("guess", "guess")
    assert len(record["guesses"]) == len(http.get("slide", params={"url": url}).json()["guesses"]) == 2
    collection = http.post("select", params={"format": "geojson"}, json={"url": url}).json()
    assert collection["places"]["patch_size"] == {"value": CELL, "unit": "px", "source": "guess"}
    refused = http.get("heatmap.png", params={"url": url})
    assert refused.status_code == 400
    assert "found no word about the unit of the coordinates (px) and the size of a patch" in refused.text
    assert http.get("heatmap.png", params={"url": url, "accept_guess": 1}).status_code == 200
    said = {"coord_unit": "px", "patch_size_level0": CELL}
    assert http.get("heatmap.png", params={"url": url, **said}).status_code == 200
    record = http.post("select", json={"url": url, **said}).json()
    assert (record["coord_unit_source"], record["patch_size"]["source"], record["guesses"]) == ("given", "given", [])


@pytest.mark.parametrize("said", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_called_json_is_refused_in_a_sentence(http, media, said):
    body = json.dumps({"url": (media / "grid.safetensors").as_uri()})
    answer = http.post("select", content=body, headers={} if said is None else {"content-type": said})
    assert answer.status_code == 400
    assert f"content-type: found {said or 'none'}, wanted application/json" in answer.text
    accepted = http.post("select", content=body, headers={"content-type": "Application/JSON; charset=utf-8"})
    assert accepted.status_code == 200


def test_what_a_request_says_against_the_file_is_refused(http, media):
    url = (media / "grid.safetensors").as_uri()
    for said in ({"coord_unit": "um"}, {"patch_size_level0": 2 * CELL}):
        answer = http.post("select", json={"url": url, **said})
        assert answer.status_code == 400
        assert "was given" in answer.text


def test_geojson_counts_from_the_bounds_of_the_file_or_from_the_slides_corner(http, media):
    make_slide(media / "bounds.safetensors", 4)
    with open_features(media / "bounds.safetensors") as slide:
        features, coords, said = slide.read_rows(0, 4), slide.read_coords(), dict(slide.metadata)
    said |= {"patch_size_level0": "256", "bounds_x": "64", "bounds_y": "32"}
    write_features(media / "bounds.safetensors", features, coords, said)
    corners = {}
    for origin in ("bounds", "slide"):
        query = {"format": "geojson", "origin": origin}
        answer = http.post("select", params=query, json={"url": (media / "bounds.safetensors").as_uri()}).json()
        corners[origin] = [f["geometry"]["coordinates"][0][0] for f in answer["features"]]
        assert answer["places"]["origin"]["bounds"] == [64, 32]
    assert [[x - 64, y - 32] for x, y in corners["slide"]] == corners["bounds"]
