"""The Gaussian mutual information against analytic values and simulations."""

import math

import numpy as np
import pytest

from vllm_wsi.study.mutual_information import gaussian_mutual_information


def correlated(rng: np.random.Generator, slides: int, rho: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal [slides, len(rho)] twice, column i of the one correlated by rho[i] with that of the other."""
    x, noise = rng.normal(size=(2, slides, len(rho)))
    return x, np.array(rho) * x + np.sqrt(1 - np.square(rho)) * noise


def gaussian(rho: list[float]) -> float:
    return -0.5 * sum(math.log(1 - r * r) for r in rho)


def test_information_of_correlated_gaussians_is_the_analytic_value():
    rho = [0.9, 0.6, 0.3, 0.0]
    found, noise = gaussian_mutual_information(*correlated(np.random.default_rng(12), 4000, rho))
    assert found == pytest.approx(gaussian(rho), rel=0.05)
    assert 0 < noise < 0.01


def test_correction_takes_off_the_bias_of_few_slides():
    rng, rho = np.random.default_rng(13), [0.8, 0.5, 0.0, 0.0]
    found = [gaussian_mutual_information(*correlated(rng, 100, rho), seed=seed)[0] for seed in range(60)]
    assert np.mean(found) == pytest.approx(gaussian(rho), abs=0.04)  # uncorrected: about 16 / 200 above


def test_information_in_the_leading_components_of_wide_features():
    rng, rho = np.random.default_rng(14), [0.9, 0.7, 0.5, 0.3]
    x, y = (hidden @ rng.normal(size=(4, 96)) for hidden in correlated(rng, 1000, rho))
    x, y = (wide + 0.05 * rng.normal(size=wide.shape) + 7 for wide in (x, y))
    assert gaussian_mutual_information(x, y)[0] == pytest.approx(gaussian(rho), rel=0.1)


def test_information_of_independent_sets_is_zero_within_the_noise():
    rng = np.random.default_rng(15)
    sets = rng.normal(size=(200, 2, 60, 12))
    found, noise = np.array([gaussian_mutual_information(x, y, seed=seed) for seed, (x, y) in enumerate(sets)]).T
    assert abs(found.mean()) < 0.02
    assert 0.01 <= (found > noise).mean() <= 0.12


def test_information_of_a_symmetric_nonlinear_dependence_goes_unseen():
    x = np.random.default_rng(16).normal(size=(3000, 1))
    found, _ = gaussian_mutual_information(x, x**2, num_components=1)
    assert abs(found) < 0.02


def test_information_takes_neither_the_order_of_slides_nor_affine_maps_into_account():
    rng = np.random.default_rng(17)
    x, y = correlated(rng, 300, [0.8, 0.4, 0.0, 0.0])
    order = rng.permutation(300)
    wanted, noise = gaussian_mutual_information(x, y)
    assert gaussian_mutual_information(x, y) == (wanted, noise)
    assert gaussian_mutual_information(x[order], y[order])[0] == pytest.approx(wanted, abs=0.01)
    assert gaussian_mutual_information(x @ rng.normal(size=(4, 4)) + 3, 5 * y)[0] == pytest.approx(wanted, abs=1e-9)
    assert gaussian_mutual_information(y, x)[0] == pytest.approx(wanted, abs=0.01)


def test_information_of_equal_sets_is_finite():
    x = np.random.default_rng(18).normal(size=(400, 8))
    found, _ = gaussian_mutual_information(x, x)
    assert 10 < found < 4 * 3.2


def test_information_uses_no_more_components_than_there_are():
    rng = np.random.default_rng(19)
    x, y = correlated(rng, 500, [0.7])
    wanted = gaussian_mutual_information(x, y, num_components=1)
    assert gaussian_mutual_information(np.hstack([x, 2 * x, np.full_like(x, 0.1)]), y) == pytest.approx(wanted)
    assert gaussian_mutual_information(np.full((500, 3), 0.1), y) == (0, 0)


def test_information_errors():
    x = np.random.default_rng(20).normal(size=(15, 6))
    with pytest.raises(ValueError, match="found 15 slides, wanted at least 16, 4 for each component"):
        gaussian_mutual_information(x, x)
    gaussian_mutual_information(x, x, num_components=3)
    with pytest.raises(ValueError, match="y: found 14 slides, wanted 15"):
        gaussian_mutual_information(x, x[1:], num_components=2)
    with pytest.raises(ValueError, match=r"x: found shape \[15\]"):
        gaussian_mutual_information(x[:, 0], x, num_components=2)
    with pytest.raises(ValueError, match="y: found 1 NaN or infinite"):
        gaussian_mutual_information(x, np.where(x == x[2, 3], math.nan, x), num_components=2)
    for arguments in ({"num_components": 0}, {"permutations": 0}):
        with pytest.raises(ValueError, match="wanted at least 1 each"):
            gaussian_mutual_information(x, x, **arguments)
