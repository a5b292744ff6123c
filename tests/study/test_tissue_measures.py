import numpy as np
import pytest

from vllm_wsi.study.tissue_figures import CELL, OUTLINE, TRUE, draw_maps, tissue_maps
from vllm_wsi.study.tissue_measures import auc, brier, calibration_bins, expected_calibration_error


def test_confidence_equal_to_accuracy_has_no_calibration_error_and_sure_wrong_answers_have_all_of_it():
    confidence = np.repeat([0.25, 0.75], 100)
    correct = np.concatenate((np.arange(100) < 25, np.arange(100) < 75))
    assert expected_calibration_error(confidence, correct) == pytest.approx(0)
    assert expected_calibration_error([1, 1], [0, 0]) == 1
    assert expected_calibration_error([0.95, 0.55], [1, 0]) == pytest.approx((0.05 + 0.55) / 2)


def test_an_edge_belongs_to_the_bin_above_it_and_one_to_the_last():
    bins = calibration_bins([0.0, 0.5, 0.4999, 1.0], [1, 1, 0, 1], bins=2)
    assert [(one.answers, one.accuracy) for one in bins] == [(2, 0.5), (2, 1.0)]
    assert np.isnan(calibration_bins([1.0], [1], bins=2)[0].accuracy)


@pytest.mark.parametrize("confidence", [[1.1], [-0.1], [np.nan]])
def test_a_confidence_that_is_no_probability_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence: found a value outside 0 to 1, or NaN"):
        calibration_bins(confidence, [1])


def test_no_answer_has_no_calibration_error():
    with pytest.raises(ValueError, match="found no answer"):
        expected_calibration_error([], [])


def test_the_brier_score_is_the_squared_distance_to_the_right_answer():
    assert brier({"A": 1.0, "B": 0.0}, "A") == 0
    assert brier({"A": 1.0, "B": 0.0}, "B") == 2
    assert brier({"A": 0.5, "B": 0.5}, "A") == 0.5


def test_auc_counts_pairs_with_ties_as_halves():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 60), rng.random(60) < 0.3
    pairs = scores[positive][:, None] - scores[~positive][None]
    assert auc(scores, positive) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert auc([1, 2, 3], np.array([False, False, True])) == 1
    assert auc([1, 1], np.array([False, True])) == 0.5
    assert auc([-np.inf, 1], np.array([False, True])) == 1
    assert np.isnan(auc([1, 2], np.array([True, True])))
    with pytest.raises(ValueError, match="found NaN"):
        auc([np.nan, 1], np.array([False, True]))


def test_the_map_shows_tumour_where_it_is_and_outlines_the_best(tmp_path):
    coords = np.array([[101, 51], [151, 51], [101, 151]])
    panels = tissue_maps(coords, 50, np.array([False, True, False]), {"s": np.array([0.0, 1.0, 2.0])}, 1)
    truth, heat = panels.values()
    assert truth.shape == heat.shape == (3 * CELL, 2 * CELL, 3)
    middle = CELL // 2
    assert tuple(truth[middle, CELL + middle]) == TRUE
    assert tuple(truth[middle, middle]) != TRUE
    assert tuple(truth[CELL + middle, middle]) == (255, 255, 255)  # no patch
    assert tuple(heat[2 * CELL, 0]) == OUTLINE
    assert tuple(heat[0, 0]) != OUTLINE
    low, mid, high = (int(heat[y, x].sum()) for y, x in ((0, 0), (0, CELL), (2 * CELL + middle, middle)))
    assert low < mid < high
    assert draw_maps(tmp_path / "m.png", panels).read_bytes().startswith(b"\x89PNG")
