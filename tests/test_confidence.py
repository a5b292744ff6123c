"""Risk against coverage and calibration error, by hand and at their limits."""

import numpy as np
import pytest

from vllm_wsi.confidence import calibration_error, risk_coverage


def test_the_curve_withholds_the_least_confident_answers_first():
    curve = risk_coverage([True, False, True, True], [0.9, 0.2, 0.8, 0.4])
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve.risk.tolist() == [0.0, 0.0, 0.0, 0.25]
    assert curve.area == 0.0625
    assert [curve.risk_at(share) for share in (0.1, 0.75, 0.76, 1.0)] == [0.0, 0.0, 0.25, 0.25]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_answers_of_equal_confidence_count_alike_whatever_their_order(order):
    right = np.array([True, False, True, False])[order]
    assert risk_coverage(right, np.ones(4)).risk.tolist() == [0.5] * 4


def test_one_answer_has_a_curve_of_one_point():
    curve = risk_coverage([False], [0.3])
    assert (curve.coverage.tolist(), curve.risk.tolist(), curve.area) == ([1.0], [1.0], 1.0)


def test_calibration_error_is_the_mean_gap_between_share_right_and_probability():
    assert calibration_error([True, True, False, False], [0.5] * 4, num_bins=1) == 0.0
    assert calibration_error([True, False], [1.0, 0.0]) == 0.0
    assert calibration_error([False, True], [1.0, 0.0]) == 1.0
    assert calibration_error([True] * 3 + [False], [0.5] * 4, num_bins=1) == 0.25


def test_probabilities_that_are_true_have_a_small_error_and_overconfident_ones_a_large_one():
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=20_000)
    right = rng.uniform(size=20_000) < truth
    assert calibration_error(right, truth) < 0.02
    assert calibration_error(right, (truth > 0.5).astype(float)) > 0.2


@pytest.mark.parametrize(("right", "trust"), [([], []), ([True], [0.1, 0.2]), ([True], [np.nan]), ([[True]], [[0.1]])])
def test_what_are_no_answers_is_refused(right, trust):
    with pytest.raises(ValueError, match=r"found|confidence"):
        risk_coverage(right, trust)


def test_a_probability_out_of_range_is_refused():
    with pytest.raises(ValueError, match="wanted 0 to 1"):
        calibration_error([True], [1.1])
