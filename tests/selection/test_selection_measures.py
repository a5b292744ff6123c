"""Measures of a selection, by hand and against sums over pairs."""

import math

import numpy as np
import pytest

from vllm_wsi.selection.selection_measures import key_patch_recall, redundancy


def test_redundancy_by_hand():
    assert redundancy([[1, 0], [0, 2], [3, 0]]) == pytest.approx(1 / 3)
    assert redundancy([[2, 1], [4, 2]]) == pytest.approx(1)
    assert redundancy([[2, 1], [-4, -2]]) == pytest.approx(-1)
    assert redundancy([[1, 1], [1, 1], [0, 0]]) == pytest.approx(1 / 3)


def test_redundancy_is_the_mean_over_pairs():
    features = np.random.default_rng(11).normal(size=(32, 48)).astype(np.float32) + 0.5
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert redundancy(features) == pytest.approx((unit @ unit.T)[np.triu_indices(32, 1)].mean(), abs=1e-6)


def test_redundancy_of_fewer_than_two_patches_is_nan():
    assert math.isnan(redundancy(np.ones((1, 4))))
    assert math.isnan(redundancy(np.ones((0, 4))))
    with pytest.raises(ValueError, match=r"features: found shape \[4\]"):
        redundancy(np.ones(4))


def test_key_patch_recall_by_hand():
    assert key_patch_recall([1, 2, 3], [3, 9], k=3) == 0.5
    assert key_patch_recall([1, 2], range(100), k=2) == 1
    assert key_patch_recall([1, 2], range(1, 100), k=4) == 0.5
    assert key_patch_recall([], [1], k=4) == 0
    assert math.isnan(key_patch_recall([1], [], k=4))


def test_row_errors():
    with pytest.raises(ValueError, match=r"kept_rows: found float64 \[1\]"):
        key_patch_recall([1.5], [1], k=1)
    with pytest.raises(ValueError, match="key_patches: found -1, wanted at least 0"):
        key_patch_recall([1], [2, -1], k=1)
    with pytest.raises(ValueError, match=r"key_patches: found bool \[2\]"):
        key_patch_recall([1], [True, False], k=1)
    with pytest.raises(ValueError, match="k: found 0"):
        key_patch_recall([], [1], k=0)
    with pytest.raises(ValueError, match="found 3 rows, wanted at most k = 2"):
        key_patch_recall([1, 2, 3], [1], k=2)
