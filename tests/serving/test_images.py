"""The pool of open slide images, deep-zoom geometry, and the listing of a folder; no server."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_wsi.errors import SlideError
from vllm_wsi.serving.viewer import slide_folder
from vllm_wsi.serving.viewer.images import MAX_READ_PX, ImagePool, deep_zoom, read_px, tile
from vllm_wsi.serving.viewer.slide_folder import image_of, list_slides

from .grid_slides import make_grid_image, make_grid_slide


class Pyramid:
    """Sizes of an image, without pixels."""

    def __init__(self, width, height, *downsamples):
        self.dimensions, self.level_downsamples = (width, height), (1.0, *downsamples)

    def get_best_level_for_downsample(self, scale):
        return max(i for i, found in enumerate(self.level_downsamples) if i == 0 or found <= scale)


@pytest.mark.parametrize(
    ("image", "levels"),
    [
        (Pyramid(1, 1), (0, 0)),
        (Pyramid(300, 200), (9, 9)),  # one tile
        (Pyramid(100_000, 80_000, 4, 16, 64), (9, 17)),
        (Pyramid(100_000, 80_000), (13, 17)),  # no pyramid: one tile of level 13 reads 8192 x 8192 px
        (Pyramid(100_000, 900), (10, 17)),
    ],
)
def test_no_level_is_offered_whose_tiles_cost_too_much(image, levels):
    zoom = deep_zoom(image)
    assert (zoom.min_level, zoom.max_level) == levels
    for level in range(zoom.min_level, zoom.max_level + 1):
        side = 512 * zoom.scale(level)
        width, height = (min(side, length) for length in image.dimensions)
        assert read_px(image, width, height, zoom.scale(level)) <= MAX_READ_PX


@pytest.fixture
def opened(monkeypatch):
    """Counts what the pool opens and closes."""
    from vllm_wsi.encoding import image as images

    events, original = [], images.open_image

    def open_image(path):
        found = original(path)
        close = found.close
        found.close = lambda: (events.append(("closed", path.name)), close())
        events.append(("opened", path.name))
        return found

    monkeypatch.setattr(images, "open_image", open_image)
    return events


def test_an_image_is_opened_once_and_the_least_recently_used_is_closed(tmp_path, opened):
    paths = [make_grid_image(tmp_path / f"{i}.tiff") for i in range(3)]
    pool = ImagePool(size=2)
    for i in (0, 1, 0, 2, 0, 1):
        with pool.image(paths[i]) as image:
            assert image.dimensions == (2000, 1600)
    assert opened == [
        ("opened", "0.tiff"), ("opened", "1.tiff"), ("opened", "2.tiff"), ("closed", "1.tiff"), ("opened", "1.tiff"),
        ("closed", "2.tiff"),
    ]  # fmt: skip


def test_an_image_in_use_is_closed_by_its_last_user(tmp_path, opened):
    paths = [make_grid_image(tmp_path / f"{i}.tiff") for i in range(2)]
    pool = ImagePool(size=1)
    with pool.image(paths[0]) as first:
        with pool.image(paths[1]):
            assert ("closed", "0.tiff") not in opened
        assert tile(first, "0.tiff", 9, 0, 0)[:2] == b"\xff\xd8"
    assert opened[-1] == ("closed", "0.tiff")


def test_an_image_that_failed_is_not_used_again(tmp_path, opened):
    path = make_grid_image(tmp_path / "a.tiff")
    pool = ImagePool()
    with pytest.raises(SlideError, match=r"^a\.tiff: found damaged pixels \(no luck\)"), pool.image(path):
        raise RuntimeError("no luck")
    assert opened == [("opened", "a.tiff"), ("closed", "a.tiff")]
    with pytest.raises(SlideError, match="level: found 99"), pool.image(path) as image:  # a fault of the request
        tile(image, path.name, 99, 0, 0)
    with pool.image(path):
        pass
    assert len(opened) == 3


def test_many_threads_read_one_image(tmp_path, opened):
    path, start = make_grid_image(tmp_path / "a.tiff"), threading.Barrier(8)
    pool = ImagePool()

    def read(i):
        start.wait()
        with pool.image(path) as image:
            return tile(image, path.name, 10, i % 2, 0)

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(read, range(8)))) == 2
    kept_open = opened.count(("opened", "a.tiff")) - opened.count(("closed", "a.tiff"))
    assert kept_open == 1


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    path = make_grid_image(tmp_path / "a.tiff")
    monkeypatch.setitem(sys.modules, "vllm_wsi.encoding.image", None)
    with pytest.raises(SlideError, match=r"a\.tiff: .*pip install 'vllm-wsi\[slides\]'"), ImagePool().image(path):
        pass
    assert image_of(path, tmp_path) is None
    (slide,) = list_slides(make_grid_slide(tmp_path).parent)["slides"]
    assert slide["has_image"] is False


def test_a_listing_is_bounded_in_entries_and_depth(tmp_path, monkeypatch):
    for i in range(30):
        (tmp_path / f"{i:02}.h5").touch()
    monkeypatch.setattr(slide_folder, "MAX_ENTRIES", 20)
    found = list_slides(tmp_path)
    assert (len(found["slides"]), found["truncated"]) == (20, True)
    deep = tmp_path / "deep"
    (deep / "/".join("abc")).mkdir(parents=True)
    (deep / "a" / "in.h5").touch()
    (deep / "a" / "b" / "c" / "out.h5").touch()
    monkeypatch.setattr(slide_folder, "MAX_DEPTH", 2)
    found = list_slides(deep)
    assert ([slide["name"] for slide in found["slides"]], found["truncated"]) == (["a/in.h5"], True)


def test_links_are_followed_within_the_folder_alone(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    make_grid_slide(outside, "a")
    path = make_grid_slide(inside, "b")
    (inside / "c.safetensors").symlink_to(path)
    (inside / "c.tiff").symlink_to(path.with_suffix(".tiff"))
    (inside / "d.safetensors").symlink_to(outside / "a.safetensors")
    (inside / "loop.h5").symlink_to(inside / "loop.h5")
    (inside / "folder").symlink_to(outside, target_is_directory=True)
    (inside / "M.SVS").symlink_to(path.with_suffix(".tiff"))
    (inside / "M.h5").touch()
    os.mkfifo(inside / "pipe.h5")
    found = {slide["name"]: slide["has_image"] for slide in list_slides(inside)["slides"]}
    assert found == {"b.safetensors": True, "c.safetensors": True, "M.h5": True}
    assert image_of(inside / "M.h5", inside) == path.with_suffix(".tiff")
    (inside / "e.mrxs").touch()
    (inside / "e").symlink_to(outside, target_is_directory=True)
    with pytest.raises(SlideError, match="link out of --allowed-local-media-path"):
        image_of(inside / "e.h5", inside)
