"""Heat maps and montages, pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from vllm_wsi.encoding.png import png
from vllm_wsi.rendering.geojson import KEPT_COLOUR
from vllm_wsi.rendering.pictures import CELL, LABEL, NONFINITE, colours, heat_map, heat_overlay, montage
from vllm_wsi.rendering.pictures import rank_normalise as ranks
from vllm_wsi.slides.regions import Level0Rects

LOW, HIGH = colours(np.array([0.0, 1.0])).tolist()


def squares(*left_top: tuple[float, float], size: float = 100) -> Level0Rects:
    return Level0Rects(np.array([[x, y, size, size] for x, y in left_top], float))


def test_ranks_run_from_0_to_1_whatever_the_scores_scale():
    assert ranks(np.array([3.0, -1e9, 1e30])).tolist() == [0.5, 0, 1]


def test_ties_share_their_rank_and_what_is_not_finite_has_none():
    assert ranks(np.array([1.0, 1.0, 5.0])).tolist() == [0.25, 0.25, 1]
    found = ranks(np.array([np.nan, 2.0, np.inf, 1.0, -np.inf]))
    assert np.array_equal(found, [np.nan, 1, np.nan, 0, np.nan], equal_nan=True)


@pytest.mark.parametrize(("scores", "wanted"), [([], []), ([7.0], [1.0]), ([np.nan], [np.nan])])
def test_ranks_of_none_and_of_one(scores, wanted):
    assert np.array_equal(ranks(np.array(scores)), wanted, equal_nan=True)


def test_a_patch_is_painted_on_its_own_pixels_and_all_else_is_transparent():
    overlay = heat_overlay(squares((0, 0), (300, 100)), np.array([1.0, 2.0]), (400, 200), max_side=40)
    assert overlay.shape == (20, 40, 4)
    assert (overlay[:10, :10] == [*LOW, 255]).all()
    assert (overlay[10:, 30:] == [*HIGH, 255]).all()
    assert overlay[..., 3].sum() == 2 * 100 * 255


def test_of_overlapping_patches_the_one_whose_middle_is_nearest_is_seen():
    for order in ([0, 1], [1, 0]):
        rects = Level0Rects(squares((0, 0), (50, 0))[order])
        overlay = heat_overlay(rects, np.array([1.0, 2.0])[order], (200, 100), max_side=80)
        assert (overlay[15:25, :30] == [*LOW, 255]).all()
        assert (overlay[15:25, 30:60] == [*HIGH, 255]).all()
        assert (overlay[:, 60:] == 0).all()


def test_a_high_score_does_not_cover_its_neighbours_on_a_grid_of_overlapping_patches():
    """A step of a fifth of the edge: each middle cell shows its own patch, not the best of the 25 patches on it."""
    coords = [(20.0 * x, 20.0 * y) for y in range(11) for x in range(11)]
    scores = np.zeros(121)
    scores[60] = 1  # in the middle of all
    overlay = heat_overlay(squares(*coords), scores, (300, 300), max_side=300)
    high = (overlay[..., :3] == HIGH).all(axis=-1)
    assert (overlay[..., 3] == 255).all()
    assert high[141:159, 141:159].all()
    assert high.sum() <= 21**2


def test_of_patches_in_one_place_the_higher_score_is_seen():
    for order in ([0, 1], [1, 0]):
        overlay = heat_overlay(squares((0, 0), (0, 0)), np.array([1.0, 2.0])[order], (100, 100), max_side=20)
        assert (overlay == [*HIGH, 255]).all()
        overlay = heat_overlay(squares((3, 3), (4, 4), size=1), np.array([1.0, 2.0])[order], (100, 100), max_side=10)
        assert overlay[0, 0].tolist() == [*HIGH, 255]  # smaller than a pixel


def test_a_patch_smaller_than_a_pixel_is_still_seen():
    overlay = heat_overlay(squares((900, 900), size=1), np.array([1.0]), (1000, 1000), max_side=10)
    assert overlay[9, 9].tolist() == [*HIGH, 255]


def test_patches_beyond_the_slide_are_cut_off():
    overlay = heat_overlay(squares((-50, 0), (950, 950)), np.array([1.0, 2.0]), (1000, 1000), max_side=100)
    assert overlay.shape == (100, 100, 4)
    assert overlay[0, 0].tolist() == [*LOW, 255]


def test_a_score_that_is_not_finite_is_grey():
    overlay = heat_overlay(squares((0, 0), (100, 0)), np.array([np.nan, 1.0]), (200, 100), max_side=20)
    assert overlay[0, 0].tolist() == [*NONFINITE, 255]


def test_a_hundred_thousand_patches_are_each_on_their_pixel():
    side = 320
    coords = np.array([(x, y) for y in range(side) for x in range(side)], float) * 256
    rects = Level0Rects(np.concatenate([coords, np.full((len(coords), 2), 256)], axis=1))
    scores = np.random.default_rng(0).standard_normal(len(coords))
    overlay = heat_overlay(rects, scores, (side * 256, side * 256), max_side=side)
    assert np.array_equal(overlay[..., :3].reshape(-1, 3), colours(ranks(scores)))


def test_the_heat_map_shows_the_slide_under_the_scores_and_outlines_what_was_kept():
    rects = squares((0, 0), (300, 100))
    overlay = heat_overlay(rects, np.array([1.0, 2.0]), (400, 200), max_side=400)
    picture = heat_map(overlay, np.full((10, 20, 3), 200, np.uint8), Level0Rects(rects[1:]), (400, 200))
    assert picture.shape == (200, 400, 3)
    assert (picture[150, 100] == 200).all()
    assert picture[100, 300].tolist() == list(KEPT_COLOUR)
    assert picture[0, 0].tolist() != list(KEPT_COLOUR)
    assert not np.array_equal(picture[50, 50], (200, 200, 200))


def test_a_kept_patch_smaller_than_a_pixel_of_the_heat_map_is_still_outlined():
    rects, size = np.array([[100.0, 0, 0.5, 0.5], [700, 0, 0.5, 0.5]]), (1000.0, 1.0)
    overlay = heat_overlay(rects, np.zeros(2), size, 100)
    picture = heat_map(overlay, None, rects[:1], size)
    outlined = (picture[0] == KEPT_COLOUR).all(axis=1).nonzero()[0].tolist()
    assert 10 in outlined
    assert all(abs(x - 10) <= 1 for x in outlined)


def test_the_montage_puts_the_best_first_eight_in_a_row():
    rects = squares(*[(i * 100, 0) for i in range(32)])
    scores = np.roll(np.arange(32.0), 5)

    def read_patch(rect, size):
        return np.full((size, size, 3), int(rect[0] / 100) * 8, np.uint8)

    picture = montage(rects, scores.tolist(), list(range(32)), (3200, 100), read_patch)
    assert picture.shape == (4 * (CELL + LABEL), 8 * CELL, 3)
    for rank, patch in enumerate(np.argsort(-scores)):
        x, y = rank % 8 * CELL + CELL // 2, rank // 8 * (CELL + LABEL) + CELL // 2
        assert picture[y, x].tolist() == [patch * 8] * 3


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_a_montage_has_as_many_lines_as_it_needs(count):
    rects = squares(*[(i * 100, 0) for i in range(count)])
    picture = montage(rects, [0.0] * count, list(range(count)), (3200, 100), None)
    assert picture.shape[0] == -(-count // 8) * (CELL + LABEL)


def test_without_the_slide_image_each_cell_shows_where_its_patch_lies():
    rects = squares((0, 0), (900, 900))
    picture = montage(rects, [2.0, 1.0], [0, 1], (1000, 1000), None)
    red = np.argwhere((picture == (255, 0, 0)).all(axis=2))
    first, second = red[red[:, 1] < CELL], red[red[:, 1] >= CELL]
    assert first.max() < CELL / 3
    assert (second % CELL).min() > CELL * 2 / 3


def test_a_png_says_nothing_but_its_pixels():
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    opened = Image.open(io.BytesIO(png(picture)))
    assert np.array_equal(np.asarray(opened), picture)
    assert "icc_profile" not in opened.info
