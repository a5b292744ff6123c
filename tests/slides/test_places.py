"""Unit, size and origin of patches under every name that the field writes; what contradicts itself is an error."""

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_wsi.errors import SlideError
from vllm_wsi.slides import open_features
from vllm_wsi.slides.feature_file import Unit
from vllm_wsi.slides.places import (
    Origin,
    PatchSize,
    Said,
    bounds_metadata,
    guesses,
    origin,
    overruled_mpp,
    patch_size,
    refuse_guesses,
    settle,
)
from vllm_wsi.slides.units import parse_unit

FEATURES = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float16)
MICRON_NAMES = ["um", "UM", " um ", "\u00b5m", "\u03bcm", "\u039cM", "micron", "microns", "MICRONS", "Micrometer",
                "micrometers", "micrometre", "micrometres"]  # fmt: skip


def grid(step) -> np.ndarray:
    x, y = np.meshgrid(np.arange(10) * step, np.arange(10) * step)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def h5(path, coords, root=(), on_coords=(), on_features=(), key="feats"):
    with h5py.File(path, "w") as file:
        file[key] = FEATURES[: len(coords)]
        file["coords"] = coords
        for place, attributes in (("/", root), ("coords", on_coords), (key, on_features)):
            file[place].attrs.update(dict(attributes))
    return path


def read(path):
    """(unit, its source, coordinates, size of a patch)"""
    with open_features(path) as slide:
        coords = slide.read_coords()
        size = patch_size(slide.metadata, coords, slide.unit, slide.name)
        return slide.coord_unit, slide.unit_source, coords, size


@pytest.mark.parametrize(
    ("said", "unit", "scale"),
    [
        *((name, "um", 1.0) for name in MICRON_NAMES),
        ("mm", "um", 1e3), ("Millimetres", "um", 1e3), ("nm", "um", 1e-3), ("nanometers", "um", 1e-3),
        ("cm", "um", 1e4), ("centimeter", "um", 1e4),
        ("px", "px", 1.0), ("PX", "px", 1.0), ("pixel", "px", 1.0), ("Pixels", "px", 1.0),
        ("level-0 pixels", "px", 1.0),
    ],
)  # fmt: skip
def test_every_spelling_of_a_unit_counts_in_h5_and_in_safetensors(said, unit, scale, tmp_path):
    assert parse_unit(said) == (unit, scale)
    h5(tmp_path / "a.h5", grid(256.0), {"unit": said})
    save_file({"features": FEATURES, "coords": grid(256).astype("int32")}, tmp_path / "a.safetensors", {"unit": said})
    for name in ("a.h5", "a.safetensors"):
        found = read(tmp_path / name)
        assert found[:2] == (unit, "file")
        assert np.allclose(found[2], grid(256.0) * scale)


@pytest.mark.parametrize("said", ["furlong", "level-1 pixels", "um/px", "mpp", "k"])
@pytest.mark.parametrize("place", ["root", "on_coords", "on_features"])
def test_an_unknown_unit_is_an_error_that_names_it(said, place, tmp_path):
    with pytest.raises(SlideError, match=f"a.h5: unit: found '{said}', wanted a unit"):
        open_features(h5(tmp_path / "a.h5", grid(256.0), **{place: {"unit": said}}))


@pytest.mark.parametrize("said", [b"um", np.bytes_(b"um"), np.array(["um"], dtype=object), np.array([b"um"])])
def test_a_unit_may_be_bytes_or_a_list_of_one(said, tmp_path):
    assert read(h5(tmp_path / "a.h5", grid(256.0), {"unit": said}))[:2] == ("um", "file")


def test_an_empty_attribute_says_nothing(tmp_path):
    said = {"unit": h5py.Empty("S1"), "patch_size_level0": h5py.Empty("f4"), "units": ""}
    assert read(h5(tmp_path / "a.h5", grid(256), said, key="features"))[1:4:2] == (
        "format",
        PatchSize(256, "px", "guess"),
    )


def test_two_units_in_one_file_are_an_error(tmp_path):
    with pytest.raises(SlideError, match="in two units"):
        open_features(h5(tmp_path / "a.h5", grid(256.0), {"unit": "um"}, {"unit": "px"}))
    with pytest.raises(SlideError, match="unit = 'um' and coord_unit = 'px', wanted one unit"):
        open_features(h5(tmp_path / "b.h5", grid(256.0), {"unit": "um", "coord_unit": "px"}))
    assert read(h5(tmp_path / "c.h5", grid(256.0), {"unit": "um"}, {"units": "micron"}))[0] == "um"


def test_fractions_alone_decide_no_unit_and_a_word_beside_them_does(tmp_path):
    assert read(h5(tmp_path / "a.h5", grid(255.5)))[:2] == (None, None)
    assert read(h5(tmp_path / "b.h5", grid(255.5), key="features"))[:2] == (None, None)
    assert read(h5(tmp_path / "c.h5", grid(255.5), {"tile_size_um": 255.5}))[:2] == ("um", "format")
    assert read(h5(tmp_path / "d.h5", grid(255.5), on_coords={"patch_size_level0": 256}))[:2] == ("px", "format")


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "uint32", "int64", "float32", "float64"])
def test_safetensors_hold_coordinates_of_every_number_type(dtype, tmp_path):
    save_file({"features": FEATURES, "coords": grid(256).astype(dtype)}, tmp_path / "a.safetensors")
    unit, source, coords, _ = read(tmp_path / "a.safetensors")
    assert (unit, source) == ("px", "format")
    assert np.array_equal(coords, grid(256))


PAIR = np.array([4.0, 4.0])


def chequerboard(step) -> np.ndarray:
    coords = grid(step)
    return coords[(coords.sum(axis=1) // step) % 2 == 0]


@pytest.mark.parametrize(
    ("coords", "attributes", "value", "unit"),
    [
        (chequerboard(256.0), {"root": {"unit": "um", "tile_size": 256.0, "stamp_version": "2.0.0"}}, 256, "um"),
        (chequerboard(0.256), {"root": {"unit": "mm", "tile_size": 0.256}}, 256, "um"),
        (chequerboard(256.0), {"root": {"tile_size_um": 256.0}}, 256, "um"),
        (chequerboard(512), {"root": {"unit": "px", "tile_size": 512}}, 512, "px"),
        (chequerboard(448), {"on_coords": {"patch_size_lv0": 448}}, 448, "px"),
        (grid(256), {"on_coords": {"patch_size_level0": np.array([512, 512])}}, 512, "px"),
        (grid(256), {"on_coords": {"patch_size_level0": np.array([512])}}, 512, "px"),
        (grid(256), {"on_coords": {"patch_size_level0": np.array([[512.0, 512.0]])}}, 512, "px"),
        (grid(256), {"on_coords": {"patch_size_level0": np.float32(512)}}, 512, "px"),
        (grid(512), {"on_coords": {"patch_size": 256, "patch_level": 1, "downsample": PAIR}}, 1024, "px"),
        (grid(512), {"on_coords": {"patch_size": 256, "patch_level": 1, "downsample": 4.0}}, 1024, "px"),
        (grid(512), {"on_coords": {"patch_size": 256, "patch_level": 0}}, 256, "px"),
        (grid(128), {"on_coords": {"patch_size": 256, "level0_magnification": 40, "target_magnification": 20}}, 512,
         "px"),
    ],
)  # fmt: skip
def test_a_size_is_read_under_every_name_of_the_field(coords, attributes, value, unit, tmp_path):
    size = read(h5(tmp_path / "a.h5", coords, **attributes))[3]
    assert size == PatchSize(value, unit, "file")


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"patch_size_level0": np.array([512, 256])}, "wanted one number, the edge of a square"),
        ({"patch_size_level0": np.array([512, 512, 3])}, "wanted one number"),
        ({"patch_size_level0": 512, "patch_size": 256, "downsample": 4.0}, "x downsample = 1024 px"),
        ({"patch_size_level0": 512, "patch_size_lv0": 256, "tile_size_level0": 300}, "wanted one size of a patch"),
    ],
)  # fmt: skip
def test_sizes_that_contradict_each_other_are_an_error(attributes, sentence, tmp_path):
    path = h5(tmp_path / "a.h5", grid(512), on_coords=attributes, key="features")
    with pytest.raises(SlideError, match=sentence):
        read(path)


def test_sizes_that_differ_by_rounding_are_one(tmp_path):
    said = {"patch_size_level0": 512, "patch_size": 256, "downsample": 2.0003}
    assert read(h5(tmp_path / "a.h5", grid(512), on_coords=said))[3] == PatchSize(512, "px", "file")


@pytest.mark.parametrize(
    ("level", "attributes", "size"),
    [
        (0, {}, PatchSize(256, "px", "file")),
        (1, {}, PatchSize(1024, "px", "guess")),
        (1, {"downsample": 4.0}, PatchSize(1024, "px", "file")),
        (1, {"patch_size_level0": 1000}, PatchSize(1000, "px", "file")),
        (1, {"patch_size": 224, "patch_size_level0": 1000}, PatchSize(1000, "px", "file")),
    ],
)
def test_the_size_that_atlaspatch_read_is_of_the_level_that_it_read(level, attributes, size, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features/uni"] = FEATURES
        file["coords"] = np.concatenate([grid(1024), np.full((100, 2), 256), np.full((100, 1), level)], axis=1)
        file.attrs.update(attributes)
    assert read(tmp_path / "a.h5")[3] == size


def test_stamps_first_format_is_its_readers_rule_and_a_guess_without_a_word(tmp_path):
    unit, source, coords, size = read(h5(tmp_path / "a.h5", chequerboard(224)))
    assert (unit, source) == ("um", "guess")
    assert np.allclose(coords, chequerboard(256))
    assert size == PatchSize(256, "um", "guess")
    unit, source, coords, size = read(h5(tmp_path / "b.h5", chequerboard(224), {"tile_size": 224}))
    assert (unit, source, size) == ("um", "format", PatchSize(256, "um", "format"))
    assert np.allclose(coords, chequerboard(256))
    assert read(h5(tmp_path / "c.h5", chequerboard(224), key="features"))[:2] == ("px", "format")  # CLAM's pixels


def test_a_user_fills_what_is_guessed_or_unknown_and_contradicts_nothing_that_the_file_says():
    guess = PatchSize(512, "px", "guess")
    assert settle("a", Unit("px", "guess"), guess, Said()) == (Unit("px", "guess"), guess)
    assert settle("a", None, None, Said()) == (None, None)
    assert settle("a", None, PatchSize(5, None, "guess"), Said(coord_unit="um")) == (
        Unit("um", "given"),
        PatchSize(5, "um", "guess"),
    )
    for source in ("file", "format"):
        with pytest.raises(SlideError, match="found coordinates in px by the file, but um was given"):
            settle("a", Unit("px", source), guess, Said(coord_unit="um"))
        assert settle("a", Unit("px", source), guess, Said(coord_unit="px"))[0] == Unit("px", source)


@pytest.mark.parametrize("given", ["px", "um"])
def test_a_given_unit_is_that_of_the_files_own_numbers_whatever_was_guessed(given):
    guessed = Unit("um", "guess", 256 / 224)
    assert settle("a", guessed, PatchSize(256, "um", "guess"), Said(coord_unit=given)) == (
        Unit(given, "given"),
        PatchSize(224, given, "guess"),
    )
    said = PatchSize(448, "px", "file")
    assert settle("a", guessed, said, Said(coord_unit=given)) == (Unit(given, "given"), said)


@pytest.mark.parametrize(
    ("in_file", "given", "said"),
    [
        ("0.25", 0.5, "mpp: found 0.25 in the file, but 0.5 was given, which is taken"),
        ("0.499", 0.5, None),  # rounded
        ("0.25", None, None),
        ("unknown", 0.5, None),
        (None, 0.5, None),
    ],
)
def test_microns_per_pixel_that_overrule_the_files_are_told(in_file, given, said):
    metadata = {} if in_file is None else {"mpp": in_file}
    assert overruled_mpp(metadata, Said(mpp=given)) == said


def test_a_guess_is_named_and_refused_until_it_is_accepted():
    unit, size = Unit("px", "guess"), PatchSize(512, "px", "guess")
    scaled = "the unit of the coordinates (um, 1.14286 in each of the file's numbers)"
    assert guesses(Unit("um", "guess", 256 / 224), None) == [scaled]
    assert guesses(None, None) == guesses(Unit("px", "format"), PatchSize(1, "px", "given")) == []
    refuse_guesses("a", [])
    with pytest.raises(SlideError, match="a: found no word about the unit of the coord"):
        refuse_guesses("a", guesses(unit, size))


PROPERTIES = {f"openslide.bounds-{key}": str(i) for i, key in enumerate(("x", "y", "width", "height"), 7)}


def test_an_origin_is_the_files_or_the_images_and_both_agree():
    said = bounds_metadata(PROPERTIES)
    assert said == {"bounds_x": "7", "bounds_y": "8", "bounds_width": "9", "bounds_height": "10"}
    assert bounds_metadata({}) == {}
    assert origin("a", said, None) == Origin(7, 8, "file")
    assert origin("a", {}, PROPERTIES) == origin("a", said, PROPERTIES) == Origin(7, 8, "image")
    assert origin("a", {}, {}) == Origin(0, 0, "image")
    assert origin("a", {}, None) == Origin(0, 0, "unknown")
    assert origin("a", {"reader": "OpenSlide", "slide_file": "a.svs"}, None) == Origin(0, 0, "file")
    with pytest.raises(SlideError, match="an origin of 7, 8 in the file and 0, 0 in the slide's image"):
        origin("a", said, {})
