"""Statistics: bootstrap over slides against SciPy and simulations, McNemar, mutual information, shares by hand."""

import math
import subprocess
import sys

import numpy as np
import pytest

from vllm_wsi.stats import (
    LENGTH_BINS,
    Interval,
    bootstrap_mean,
    gaussian_mutual_information,
    key_patch_recall,
    length_bin,
    mcnemar,
    paired_bootstrap,
    redundancy,
)


def test_lengths_fall_into_the_bins_of_the_papers_figure_and_an_edge_into_the_bin_above_it():
    assert LENGTH_BINS == (
        "<64", "64-128", "128-256", "256-512", "512-1024", "1024-2048", "2048-4096", ">=4096",
    )  # fmt: skip
    lengths = (1, 63, 64, 127, 128, 4095, 4096, 10**6)
    assert [length_bin(n) for n in lengths] == [
        "<64", "<64", "64-128", "64-128", "128-256", "2048-4096", ">=4096", ">=4096",
    ]  # fmt: skip


def clustered(rng: np.random.Generator, slides: int, questions: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Normal values of mean 0 whose slides differ by spread, and the slide of each."""
    groups = np.repeat(np.arange(slides), questions)
    return rng.normal(size=slides * questions) + spread * rng.normal(size=slides)[groups], groups


def correlated(rng: np.random.Generator, slides: int, rho: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal [slides, len(rho)] twice, column i of the one correlated by rho[i] with that of the other."""
    x, noise = rng.normal(size=(2, slides, len(rho)))
    return x, np.array(rho) * x + np.sqrt(1 - np.square(rho)) * noise


def width(interval: Interval) -> float:
    return interval.high - interval.low


# ---- Intervals


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_bootstrap_of_single_questions_is_that_of_scipy(kind, level):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    values = rng.random(600) < 0.7 if kind == "bool" else rng.exponential(size=600)
    found = bootstrap_mean(values, [f"slide-{i}" for i in range(600)], draws=8000, level=level)
    data = (values.astype(float),)
    wanted = stats.bootstrap(data, np.mean, n_resamples=8000, method="percentile", confidence_level=level, rng=0)
    assert found.estimate == pytest.approx(values.mean())
    error = values.std() / math.sqrt(600)
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=0.15 * error)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=0.15 * error)


def test_bootstrap_of_slides_is_that_of_scipy_over_sums_and_counts():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), rng.integers(1, 9, size=60))
    values = rng.random(len(groups)) < rng.random(60)[groups]
    sums, counts = np.bincount(groups, weights=values), np.bincount(groups)

    def ratio(sums, counts, axis):
        return sums.sum(axis) / counts.sum(axis)

    wanted = stats.bootstrap((sums, counts), ratio, n_resamples=8000, method="percentile", paired=True, rng=0)
    found = bootstrap_mean(values, groups.tolist(), draws=8000)
    tolerance = 0.15 * wanted.standard_error
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=tolerance)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=tolerance)


def test_interval_is_wider_where_the_questions_of_a_slide_agree():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(50), 8)
    values = (rng.random(50) < 0.6)[groups]
    clusters, naive = bootstrap_mean(values, groups), bootstrap_mean(values, range(400))
    assert clusters.estimate == naive.estimate
    assert width(clusters) == pytest.approx(math.sqrt(8) * width(naive), rel=0.1)


def test_coverage_over_slides_is_nominal_and_over_questions_is_not():
    rng = np.random.default_rng(3)
    hits, naive_hits = 0, 0
    for seed in range(300):
        values, groups = clustered(rng, slides=40, questions=4, spread=1.5)
        found = bootstrap_mean(values, groups, seed=seed, draws=400)
        naive = bootstrap_mean(values, range(len(values)), seed=seed, draws=400)
        hits += found.low <= 0 <= found.high
        naive_hits += naive.low <= 0 <= naive.high
    assert 0.89 <= hits / 300 <= 0.98
    assert naive_hits / 300 < 0.85


def test_coverage_of_the_paired_difference_is_nominal():
    rng = np.random.default_rng(4)
    hits = 0
    for seed in range(300):
        shared, groups = clustered(rng, slides=40, questions=3, spread=1.0)
        first, second = shared + 0.3 + rng.normal(size=120), shared + rng.normal(size=120)
        found = paired_bootstrap(first, second, groups, seed=seed, draws=400)
        hits += found.low <= 0.3 <= found.high
    assert 0.89 <= hits / 300 <= 0.98


def test_paired_interval_is_narrower_than_unpaired_for_correlated_answers():
    rng = np.random.default_rng(5)
    first = rng.random(300) < 0.6
    second = first ^ (rng.random(300) < 0.05)
    groups = np.repeat(np.arange(100), 3)
    paired = paired_bootstrap(first, second, groups)
    assert paired.estimate == pytest.approx(first.mean() - second.mean())
    unpaired = math.hypot(width(bootstrap_mean(first, groups)), width(bootstrap_mean(second, groups)))
    assert width(paired) < 0.5 * unpaired


def test_paired_difference_changes_sign_with_its_sides():
    rng = np.random.default_rng(6)
    first, second = rng.random((2, 90)) < 0.5
    groups = np.repeat(np.arange(30), 3)
    there = paired_bootstrap(first, second, groups, draws=8000)
    back = paired_bootstrap(second, first, groups, draws=8000)
    assert there.estimate == -back.estimate
    assert there.low == pytest.approx(-back.high, abs=0.02)
    assert paired_bootstrap(first, first, groups) == (0, 0, 0)


def test_interval_takes_neither_the_order_of_questions_nor_names_of_slides_into_account():
    rng = np.random.default_rng(7)
    values, groups = rng.random(200) < 0.4, rng.integers(0, 50, size=200)
    order = rng.permutation(200)
    wanted = bootstrap_mean(values, groups)
    assert bootstrap_mean(values[order], groups[order]) == wanted
    assert bootstrap_mean(values, [("TCGA", f"{99 - group}") for group in groups]) == wanted
    assert bootstrap_mean(values, groups.astype(str)) == wanted


def test_interval_repeats_with_its_seed_alone():
    values, groups = clustered(np.random.default_rng(8), slides=30, questions=2, spread=1.0)
    assert bootstrap_mean(values, groups, seed=1) == bootstrap_mean(values, groups, seed=1)
    assert bootstrap_mean(values, groups, seed=1) != bootstrap_mean(values, groups, seed=2)


def test_interval_widens_with_its_level():
    values, groups = clustered(np.random.default_rng(9), slides=30, questions=2, spread=1.0)
    assert width(bootstrap_mean(values, groups, level=0.5)) < width(bootstrap_mean(values, groups, level=0.99))


def test_slide_counts_by_its_questions():
    assert bootstrap_mean([1, 1, 1, 0], ["a", "a", "a", "b"]) == (0.75, 0, 1)


def test_one_slide_has_an_interval_of_no_width():
    assert bootstrap_mean([True, False, True, True], ["a"] * 4) == (0.75, 0.75, 0.75)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0])
def test_interval_of_equal_values_holds_the_estimate(value):
    found = bootstrap_mean([value] * 37, range(37))
    assert found.low <= found.estimate <= found.high
    assert found == pytest.approx((value, value, value))


def test_interval_of_skewed_values_holds_the_estimate():
    found = bootstrap_mean(np.exp(np.arange(10)), range(10), level=0.01)  # narrow, about a median far from the mean
    assert found.low < found.estimate == found.high


def test_bootstrap_errors():
    with pytest.raises(ValueError, match="found no question, wanted at least one"):
        bootstrap_mean([], [])
    with pytest.raises(ValueError, match="found no question, wanted at least one"):
        paired_bootstrap([], [], [])
    with pytest.raises(ValueError, match="groups: found 1, wanted 2, one for each question"):
        bootstrap_mean([1, 0], ["a"])
    with pytest.raises(ValueError, match="second: found 1 questions, wanted 2"):
        paired_bootstrap([1, 0], [1], ["a", "b"])
    with pytest.raises(ValueError, match=r"values: found shape \[1, 2\]"):
        bootstrap_mean([[1, 0]], ["a"])
    with pytest.raises(ValueError, match="values: found 1 NaN or infinite"):
        bootstrap_mean([1, math.nan], ["a", "b"])
    with pytest.raises(ValueError, match="draws: found 0"):
        bootstrap_mean([1, 0], ["a", "b"], draws=0)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=f"level: found {level}"):
            bootstrap_mean([1, 0], ["a", "b"], level=level)


# ---- McNemar


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


@pytest.mark.parametrize(
    ("only_first", "only_second", "wanted"), [(5, 0, 2 / 2**5), (1, 7, 2 * (1 + 8) / 2**8), (3, 3, 1.0), (1, 0, 1.0)]
)
def test_mcnemar_by_hand(only_first, only_second, wanted):
    pytest.importorskip("scipy.stats")
    first, second = answers(10, only_first, only_second, 4)
    assert mcnemar(first, second) == pytest.approx(wanted, rel=1e-12)
    assert mcnemar(np.array(second, dtype=float), np.array(first, dtype=int)) == pytest.approx(wanted, rel=1e-12)


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(10)
    for _ in range(20):
        first, second = rng.random((2, 300)) < [[0.6], [0.5]]
        wanted = stats.binomtest(int((first & ~second).sum()), int((first ^ second).sum())).pvalue
        assert mcnemar(first, second) == pytest.approx(wanted, rel=1e-12)


def test_mcnemar_without_discordant_pairs_is_one():
    assert mcnemar(*answers(3, 0, 0, 2)) == 1


def test_mcnemar_errors():
    with pytest.raises(ValueError, match="found no question, wanted at least one"):
        mcnemar([], [])
    with pytest.raises(ValueError, match="second: found 1 questions, wanted 2"):
        mcnemar([True, False], [True])
    with pytest.raises(ValueError, match="found a value other than 0 and 1"):
        mcnemar([0.5, 1], [0, 1])


# ---- Patches


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


# ---- Mutual information


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


# ---- Import


def test_module_adds_nothing_but_numpy_at_import():
    code = (
        "import sys, vllm_wsi; before = set(sys.modules); import vllm_wsi.stats;"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(added & {'numpy', 'scipy', 'sklearn', 'torch', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"
