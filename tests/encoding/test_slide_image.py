"""Slide images: what opens, what is refused, and that pixels come from where they are said to."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from openslide import OpenSlide

from vllm_wsi.encoding import image as image_module
from vllm_wsi.encoding.image import image_mpp, open_image, read_scaled, thumbnail
from vllm_wsi.encoding.tiff_image import TiffImage
from vllm_wsi.errors import SlideError

from .slide_images import write_ome_tiff, write_tiff

RANDOM = np.random.default_rng(0).integers(0, 255, (700, 900, 3), dtype=np.uint8)


def test_the_real_slide_is_read_by_openslide(shared_data):
    path = shared_data / "slides/CMU-1-Small-Region.svs"
    with open_image(path) as image:
        assert isinstance(image, OpenSlide)
        assert image.dimensions == (2220, 2967)
        assert image_mpp(image, "slide") == 0.499
        assert thumbnail(image, "slide", 300).shape == (300, 224, 3)


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("slides/broken/unopenable.tiff", "tifffile cannot decode .*openslide says: Unsupported TIFF compression"),
        ("slides/broken/unreadable.svs", "found damaged pixels .*wanted a readable slide image"),
        ("slides/nosuch.svs", "found no readable file"),
        ("features/mopadi_TCGA-AD-6964/features.h5", "found no readable TIFF"),
        ("slides", "found a directory"),
    ],
)
def test_what_is_no_readable_slide_image_is_one_sentence_that_names_it(shared_data, file, sentence):
    path = (shared_data / file).resolve()  # errors name what links lead to
    with pytest.raises(SlideError, match=sentence) as error:
        open_image(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "slide.svs")
    with pytest.raises(SlideError, match="pipe"):
        open_image(tmp_path / "slide.svs")


@pytest.mark.parametrize("planar", [False, True])
def test_an_ome_tiff_is_read_with_its_pyramid_and_its_mpp(tmp_path, planar):
    with open_image(write_ome_tiff(tmp_path / "a.ome.tif", RANDOM, 0.25, planar)) as image:
        assert isinstance(image, TiffImage)
        assert image.level_dimensions == ((900, 700), (450, 350), (225, 175))
        assert image_mpp(image, "a") == 0.25
        region = np.asarray(image.read_region((101, 203), 0, (64, 32)))
        assert np.array_equal(region[..., :3], RANDOM[203:235, 101:165])
        assert (region[..., 3] == 255).all()
        level1 = np.asarray(image.read_region((200, 100), 1, (30, 20)))[..., :3]
        assert np.array_equal(level1, RANDOM[100:140:2, 200:260:2])


def test_openslide_and_tifffile_read_the_same_pixels(tmp_path):
    flat, ome = write_tiff(tmp_path / "a.tiff", RANDOM), write_ome_tiff(tmp_path / "a.ome.tiff", RANDOM)
    with open_image(flat) as one, open_image(ome) as other:
        assert isinstance(one, OpenSlide)
        for location, size in (((0, 0), (50, 40)), ((-20, -10), (50, 40)), ((880, 690), (50, 40)), ((2000, 0), (9, 9))):
            found = [np.asarray(image.read_region(location, 0, size)) for image in (one, other)]
            assert np.array_equal(found[0][..., 3], found[1][..., 3])
            assert np.array_equal(found[0] * (found[0][..., 3:] > 0), found[1] * (found[1][..., 3:] > 0))


@pytest.mark.parametrize(
    ("array", "axes"), [(np.zeros((64, 64), np.uint8), "YX"), (np.zeros((3, 64, 64), np.uint16), "CYX")]
)
def test_an_ome_tiff_that_is_no_8_bit_rgb_is_refused(tmp_path, array, axes):
    tifffile.imwrite(tmp_path / "a.ome.tif", array, ome=True, metadata={"axes": axes})
    with pytest.raises(SlideError, match="wanted 8-bit RGB"):
        open_image(tmp_path / "a.ome.tif")


def test_a_truncated_ome_tiff_is_refused_where_its_pixels_are_missing(tmp_path):
    path = write_ome_tiff(tmp_path / "a.ome.tif", RANDOM)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(SlideError, match=r"a\.ome\.tif: found"), open_image(path) as image:
        read_scaled(image, str(path), 0, 0, 900, 700, (900, 700))


def test_mpp_is_the_slides_or_what_is_given_and_never_a_guess(tmp_path):
    with open_image(write_tiff(tmp_path / "a.tiff", RANDOM, mpp=None)) as image:
        with pytest.raises(SlideError, match=r"a\.tiff: mpp: found none in the slide, wanted it given"):
            image_mpp(image, "a.tiff")
        assert image_mpp(image, "a.tiff", 0.3) == 0.3
    with open_image(write_tiff(tmp_path / "b.tiff", RANDOM, mpp=0.5)) as image:
        assert image_mpp(image, "b.tiff") == pytest.approx(0.5)
        assert image_mpp(image, "b.tiff", 0.3) == 0.3
        for wrong in (0.0, -1.0, True, float("nan"), float("inf")):
            with pytest.raises(SlideError, match=f"mpp: found {wrong} given, wanted microns per pixel"):
                image_mpp(image, "b.tiff", wrong)


@pytest.mark.parametrize("said", ["", "x", "nan", "inf", "0", "-1", "True"])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_an_mpp_of_the_slide_that_is_no_number_above_0_is_refused_as_it_was_found(axis, said):
    properties = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5", f"openslide.mpp-{axis}": said}
    found = f"'{said}' x '0.5'" if axis == "x" else f"'0.5' x '{said}'"
    with pytest.raises(SlideError, match=f"^a.svs: mpp: found {found} in the slide, wanted finite numbers above 0"):
        image_mpp(SimpleNamespace(properties=properties), "a.svs")


def test_pixels_that_are_not_square_are_refused(tmp_path):
    layout = {"tile": (256, 256), "photometric": "rgb", "resolution": (20000, 30000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "a.tiff", RANDOM, **layout)
    with open_image(tmp_path / "a.tiff") as image, pytest.raises(SlideError, match="one size for both directions"):
        image_mpp(image, "a.tiff")


def test_at_its_own_scale_a_region_is_the_slides_pixels_and_white_beyond_it(tmp_path):
    with open_image(write_tiff(tmp_path / "a.tiff", RANDOM)) as image:
        assert np.array_equal(read_scaled(image, "a", 100, 50, 64, 32, (64, 32)), RANDOM[50:82, 100:164])
        beyond = read_scaled(image, "a", 890, 690, 20, 20, (20, 20))
        assert np.array_equal(beyond[:10, :10], RANDOM[690:, 890:])
        assert (beyond[10:] == 255).all()
        assert (beyond[:, 10:] == 255).all()
        assert (read_scaled(image, "a", -5, -5, 5, 5, (5, 5)) == 255).all()


def test_a_region_scaled_down_in_bands_is_what_it_is_in_one_piece(tmp_path, monkeypatch):
    picture = np.repeat(np.repeat(RANDOM[:100, :100], 7, axis=0), 9, axis=1)
    with open_image(write_tiff(tmp_path / "a.tiff", picture)) as image:
        whole = read_scaled(image, "a", 0, 0, 900, 700, (100, 100))
        monkeypatch.setattr(image_module, "BAND_PX", 20_000)
        bands = read_scaled(image, "a", 0, 0, 900, 700, (100, 100))
    assert np.abs(whole.astype(int) - bands.astype(int)).max() <= 1  # of rounding
