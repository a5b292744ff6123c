"""Where patches lie on the slide, and what QuPath is told of it."""

import json

import numpy as np
import pytest

from vllm_wsi.errors import SlideError
from vllm_wsi.rendering.geojson import geojson
from vllm_wsi.slides.feature_file import Unit
from vllm_wsi.slides.places import Origin, PatchSize, patch_size
from vllm_wsi.slides.regions import check_image, extent, level0_rects, said_size
from vllm_wsi.slides.units import positive_number

GRID = np.array([[x, y] for y in (0, 512, 1024) for x in (0, 512, 1536)])
NO_NUMBERS = ["", "x", "nan", "inf", "-inf", "1e999", "0", "-0.0", "-1", "True", "0.5 um"]  # as a file may hold them


@pytest.mark.parametrize(
    "said", [*NO_NUMBERS, None, True, False, 0, 0.0, -1.0, 10**400, float("nan"), float("inf"), float("-inf")]
)
def test_a_size_or_a_scale_is_a_finite_number_above_0_and_nothing_else(said):
    assert positive_number(said) is None


def test_numbers_are_read_from_a_files_text_and_from_what_is_given():
    assert [positive_number(said) for said in ("0.499", " 448 ", "1e3", 2, 0.25)] == [0.499, 448, 1000, 2, 0.25]


@pytest.mark.parametrize(
    ("metadata", "unit", "wanted"),
    [
        ({"patch_size_level0": "448"}, "px", PatchSize(448, "px", "file")),
        ({"patch_size_level0": "448.0"}, "px", PatchSize(448, "px", "file")),
        *(({"patch_size_level0": said}, "px", PatchSize(512, "px", "guess")) for said in NO_NUMBERS),
        ({"patch_size_level0": "448"}, "um", PatchSize(448, "px", "file")),
        ({"tile_size_um": "256"}, "um", PatchSize(256, "um", "file")),
        ({}, "px", PatchSize(512, "px", "guess")),
    ],
)
def test_a_patchs_size_is_the_files_word_or_else_the_grids_spacing(metadata, unit, wanted):
    assert patch_size(metadata, GRID, Unit(unit, "file")) == wanted


@pytest.mark.parametrize("coords", [GRID[:1], GRID[[0, 3, 6]], np.zeros((4, 2))])
def test_a_size_is_not_guessed_where_no_two_patches_are_neighbours(coords):
    assert patch_size({}, coords, Unit("px", "file")) is None


def test_the_grid_is_found_in_any_order_of_the_patches():
    shuffled = np.random.default_rng(0).permutation(GRID)
    assert patch_size({}, shuffled, Unit("px", "file")) == PatchSize(512, "px", "guess")


def test_pixels_stay_pixels_whatever_mpp_says():
    rects = level0_rects("a", GRID, "px", PatchSize(512, "px", "file"), {"mpp": "0.25"}, mpp=0.5)
    assert rects.tolist() == [[x, y, 512, 512] for x, y in GRID.tolist()]


def test_microns_become_pixels_by_mpp():
    size = PatchSize(256, "um", "file")
    wanted = [[x * 4, y * 4, 1024, 1024] for x, y in GRID.tolist()]
    assert level0_rects("a", GRID, "um", size, {"mpp": "0.25"}).tolist() == wanted
    assert level0_rects("a", GRID, "um", size, {"mpp": "0.5"}, mpp=0.25).tolist() == wanted


def test_a_size_given_in_pixels_fits_coordinates_in_microns():
    rects = level0_rects("a", GRID, "um", PatchSize(100, "px", "given"), {}, mpp=0.5)
    assert rects[1].tolist() == [1024, 0, 100, 100]


@pytest.mark.parametrize("mpp", [None, 0.0, -1.0, True, float("nan"), float("inf")])
def test_microns_without_mpp_never_pass_for_pixels(mpp):
    found = "none" if mpp is None else mpp
    with pytest.raises(SlideError, match=f"a: mpp: found {found} with coordinates in microns, wanted"):
        level0_rects("a", GRID, "um", PatchSize(256, "um", "file"), {}, mpp)


@pytest.mark.parametrize("said", NO_NUMBERS)
def test_an_mpp_of_the_file_that_is_no_number_above_0_is_shown_in_the_error(said):
    with pytest.raises(SlideError, match=f"^a: mpp: found '{said}' with coordinates in microns, wanted [^\n]*$"):
        level0_rects("a", GRID, "um", PatchSize(256, "um", "file"), {"mpp": said})


def test_an_error_shows_the_beginning_of_a_long_text_alone():
    with pytest.raises(SlideError) as error:
        level0_rects("a", GRID, "um", PatchSize(256, "um", "file"), {"mpp": "long\n" * 1000})
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


def test_a_place_that_is_not_finite_is_refused():
    size = PatchSize(256, "um", "file")
    for coords, mpp in ((GRID, 1e-320), (np.where(GRID == 512, np.nan, GRID), 0.5)):
        with pytest.raises(SlideError, match="a: coords: found a place that is not finite, wanted finite level-0 pix"):
            level0_rects("a", coords, "um", size, {}, mpp)


def test_what_is_missing_is_named():
    with pytest.raises(SlideError, match="coords: found none"):
        level0_rects("a", None, None, PatchSize(1, "px", "file"), {})
    with pytest.raises(SlideError, match="coords: found no unit, wanted coord_unit given, px or um"):
        level0_rects("a", GRID, None, PatchSize(1, "px", "file"), {})
    with pytest.raises(SlideError, match="patch_size_level0: found none"):
        level0_rects("a", GRID, "px", None, {})


def test_a_slides_extent_is_what_the_file_says_and_never_less_than_its_patches():
    rects = level0_rects("a", GRID, "px", PatchSize(512, "px", "file"), {})
    assert extent(rects, {}) == (2048, 1536)
    assert extent(rects, {"width": "9000", "height": "8000"}) == (9000, 8000)
    assert extent(rects, {"level0_width": "9000", "level0_height": "8000"}) == (9000, 8000)
    assert extent(rects, {"width": "100", "height": "100"}) == (2048, 1536)
    assert extent(rects, {"width": "9000"}) == (2048, 1536)


@pytest.mark.parametrize("said", NO_NUMBERS)
@pytest.mark.parametrize("key", ["width", "height"])
def test_a_slides_size_is_two_numbers_above_0_or_not_said(key, said):
    rects = level0_rects("a", GRID, "px", PatchSize(512, "px", "file"), {})
    half_said = {"width": "9000", "height": "8000"} | {key: said}
    assert said_size(half_said) is None
    assert extent(rects, half_said) == (2048, 1536)
    assert said_size(half_said | {"level0_width": "9000", "level0_height": "8000"}) == (9000, 8000)


@pytest.mark.parametrize(
    ("size_px", "metadata", "wanted"),
    [
        ((2048, 1536), {}, None),
        ((1537, 1025), {}, None),  # the last patches reach beyond
        ((1536, 1025), {}, "a.svs: found 1536 x 1025 px, wanted more, as a has a patch at 1536, 0; "),
        ((2048, 1024), {}, "a.svs: found 2048 x 1024 px, wanted more, as a has a patch at 0, 1024; "),
        ((9000, 8000), {"width": "9000.0", "height": "8000"}, None),
        ((9001, 8000), {"width": "9000", "height": "8000"}, "a.svs: found 9001 x 8000 px, wanted 9000 x 8000, as a "),
        ((9000, 8001), {"level0_width": "9000", "level0_height": "8000"}, "wanted 9000 x 8000, as a says"),
        ((1234567, 8000), {"width": "7654321", "height": "8000"}, "found 1234567 x 8000 px, wanted 7654321 x 8000"),
        ((9000, 8000), {"width": "512", "height": "512"}, None),  # of a patch
        ((9000, 8000), {"width": "1"}, None),
    ],
)
def test_an_image_is_of_the_size_that_the_file_says_and_every_patch_begins_on_it(size_px, metadata, wanted):
    rects = level0_rects("a", GRID, "px", PatchSize(512, "px", "file"), {})
    if wanted is None:
        check_image("a.svs", size_px, "a", metadata, rects)
    else:
        with pytest.raises(SlideError, match=wanted):
            check_image("a.svs", size_px, "a", metadata, rects)


SAID, SIZE, NO_BOUNDS = Unit("px", "format"), PatchSize(512, "px", "file"), Origin(0, 0, "file")


def collection_of(rects, scores, rows, slide="a", unit=SAID, size=SIZE, origin=NO_BOUNDS, cropped=True):
    return geojson(rects, scores, rows, slide, unit, size, origin, cropped)


def test_geojson_counts_from_the_slides_bounds_as_qupath_does_and_says_so():
    rects = level0_rects("a", GRID[:2], "px", SIZE, {})
    cropped = collection_of(rects, [1.0, 2.0], [0, 1], origin=Origin(100, 300, "image"))
    whole = collection_of(rects, [1.0, 2.0], [0, 1], origin=Origin(100, 300, "image"), cropped=False)
    assert [f["geometry"]["coordinates"][0][0] for f in cropped["features"]] == [[-100, -300], [412, -300]]
    assert [f["geometry"]["coordinates"][0][0] for f in whole["features"]] == [[0, 0], [512, 0]]
    assert cropped["places"]["origin"] == {"x": 100, "y": 300, "bounds": [100, 300], "source": "image"}
    assert whole["places"]["origin"] == {"x": 0, "y": 0, "bounds": [100, 300], "source": "image"}


def test_geojson_says_of_each_patch_what_is_guessed():
    rects = level0_rects("a", GRID[:2], "px", SIZE, {})
    said = collection_of(rects, [1.0, 2.0], [0, 1])
    assert said["places"]["patch_size"] == {"value": 512, "unit": "px", "source": "file"}
    assert not any("metadata" in feature["properties"] for feature in said["features"])
    guessed = collection_of(rects, [1.0, 2.0], [0, 1], unit=Unit("px", "guess"), size=SIZE._replace(source="guess"))
    assert guessed["places"]["coord_unit"] == {"value": "px", "source": "guess"}
    assert guessed["places"]["patch_size"]["source"] == "guess"
    words = {feature["properties"]["metadata"]["guess"] for feature in guessed["features"]}
    assert words == {"the unit of the coordinates (px) and the size of a patch (512 px, the spacing of the grid)"}


def test_geojson_holds_closed_rings_in_level0_pixels_and_the_score_as_a_measurement():
    rects = level0_rects("a", GRID[:3], "px", PatchSize(512, "px", "file"), {})
    collection = json.loads(json.dumps(collection_of(rects, [0.5, 2.0, 0.5], [7, 9, 11])))
    assert collection["type"] == "FeatureCollection"
    assert "crs" not in collection
    assert [f["properties"]["measurements"] for f in collection["features"]] == [
        {"score": 0.5, "rank": 2, "row": 7},
        {"score": 2.0, "rank": 1, "row": 9},
        {"score": 0.5, "rank": 3, "row": 11},
    ]
    ring = collection["features"][2]["geometry"]["coordinates"][0]
    assert ring == [[1536, 0], [2048, 0], [2048, 512], [1536, 512], [1536, 0]]
    assert collection["features"][0]["properties"]["objectType"] == "annotation"


def test_the_same_patch_has_the_same_id_and_others_have_others():
    rects = level0_rects("a", GRID[:2], "px", PatchSize(512, "px", "file"), {})
    ids = [
        [f["id"] for f in collection_of(rects, [1.0, 2.0], rows, slide)["features"]]
        for rows, slide in (([1, 2], "a"), ([1, 2], "a"), ([1, 2], "b"))
    ]
    assert ids[0] == ids[1]
    assert len({*ids[0], *ids[2]}) == 4
