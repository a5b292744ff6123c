"""Statistics: intervals against SciPy, by hand and in simulations; paired tests; corrections for many tests."""

import math
import subprocess
import sys

import numpy as np
import pytest

from vllm_wsi.stats import (
    LENGTH_BINS,
    Interval,
    holm,
    length_bin,
    mcnemar,
    mean_interval,
    p_text,
    paired_interval,
    paired_p,
    proportion_interval,
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


REAL = (-math.inf, math.inf)


def width(interval: Interval) -> float:
    return interval.high - interval.low


# ---- Intervals


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(24, 24, 0.8575, 1), (0, 24, 0, 0.1425), (1, 1, 0.025, 1), (5, 10, 0.1871, 0.8129), (191, 192, 0.9713, 0.9999)],
)
def test_interval_of_a_share_is_that_of_clopper_and_pearson(successes, n, low, high):
    found = proportion_interval(successes, n)
    assert found == pytest.approx((successes / n, low, high), abs=5e-5)
    # Its definition: at either end the tail that holds what was seen has 2.5 %.
    binom = pytest.importorskip("scipy.stats").binom
    if successes:
        assert binom.sf(successes - 1, n, found.low) == pytest.approx(0.025)
    if successes < n:
        assert binom.cdf(successes, n, found.high) == pytest.approx(0.025)


def test_right_or_wrong_with_one_question_a_slide_has_the_exact_interval():
    right = [True] * 24
    assert (
        mean_interval(right) == mean_interval(right, [f"slide-{i}" for i in range(24)]) == proportion_interval(24, 24)
    )
    assert mean_interval([1, 0, 1.0], level=0.8) == proportion_interval(2, 3, level=0.8)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_interval_of_single_scores_is_the_bca_of_scipy(level):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).beta(4, 0.5, size=80)  # skewed: BCa and the percentile interval differ
    bca, percentile = (
        stats.bootstrap((values,), np.mean, n_resamples=20000, method=method, confidence_level=level, rng=0)
        for method in ("BCa", "percentile")
    )
    found = mean_interval(values, draws=20000, level=level)
    error = values.std() / math.sqrt(80)
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(bca.confidence_interval.low, abs=0.06 * error)
    assert found.high == pytest.approx(bca.confidence_interval.high, abs=0.06 * error)
    if level == 0.95:
        assert abs(bca.confidence_interval.low - percentile.confidence_interval.low) > 0.12 * error


def test_interval_over_slides_is_the_bca_of_scipy_over_sums_and_counts():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), rng.integers(1, 9, size=60))
    values = rng.random(len(groups)) < rng.random(60)[groups]
    sums, counts = np.bincount(groups, weights=values), np.bincount(groups)

    def ratio(sums, counts, axis):
        return sums.sum(axis) / counts.sum(axis)

    wanted = stats.bootstrap((sums, counts), ratio, n_resamples=20000, method="BCa", paired=True, rng=0)
    found = mean_interval(values, groups.tolist(), draws=20000)
    tolerance = 0.06 * wanted.standard_error
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(wanted.confidence_interval.low, abs=tolerance)
    assert found.high == pytest.approx(wanted.confidence_interval.high, abs=tolerance)


def test_interval_is_wider_where_the_questions_of_a_slide_agree():
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(50), 8)
    values = (rng.random(50) < 0.6)[groups]
    clusters, naive = mean_interval(values, groups), mean_interval(values)
    assert clusters.estimate == naive.estimate
    assert width(clusters) == pytest.approx(math.sqrt(8) * width(naive), rel=0.1)


def test_coverage_over_slides_is_nominal_and_over_questions_is_not():
    rng = np.random.default_rng(3)
    hits, naive_hits = 0, 0
    for seed in range(300):
        values, groups = clustered(rng, slides=40, questions=4, spread=1.5)
        found = mean_interval(values, groups, REAL, seed=seed, draws=400)
        naive = mean_interval(values, bounds=REAL, seed=seed, draws=400)
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
        found = paired_interval(first, second, groups, REAL, seed=seed, draws=400)
        hits += found.low <= 0.3 <= found.high
    assert 0.89 <= hits / 300 <= 0.98


def test_paired_interval_is_narrower_than_unpaired_for_correlated_answers():
    rng = np.random.default_rng(5)
    first = rng.random(300) < 0.6
    second = first ^ (rng.random(300) < 0.05)
    groups = np.repeat(np.arange(100), 3)
    paired = paired_interval(first, second, groups)
    assert paired.estimate == pytest.approx(first.mean() - second.mean())
    unpaired = math.hypot(width(mean_interval(first, groups)), width(mean_interval(second, groups)))
    assert width(paired) < 0.5 * unpaired


def test_paired_difference_changes_sign_with_its_sides():
    rng = np.random.default_rng(6)
    first, second = rng.random((2, 90)) < 0.5
    groups = np.repeat(np.arange(30), 3)
    there = paired_interval(first, second, groups, draws=8000)
    back = paired_interval(second, first, groups, draws=8000)
    assert there.estimate == -back.estimate
    assert there.low == pytest.approx(-back.high, abs=0.02)


def test_interval_takes_neither_the_order_of_questions_nor_names_of_slides_into_account():
    rng = np.random.default_rng(7)
    values, groups = rng.random(200) < 0.4, rng.integers(0, 50, size=200)
    order = rng.permutation(200)
    wanted = mean_interval(values, groups)
    assert mean_interval(values[order], groups[order]) == wanted
    assert mean_interval(values, [("TCGA", f"{99 - group}") for group in groups]) == wanted
    assert mean_interval(values, groups.astype(str)) == wanted


def test_interval_repeats_with_its_seed_alone():
    values, groups = clustered(np.random.default_rng(8), slides=30, questions=2, spread=1.0)
    assert mean_interval(values, groups, REAL, seed=1) == mean_interval(values, groups, REAL, seed=1)
    assert mean_interval(values, groups, REAL, seed=1) != mean_interval(values, groups, REAL, seed=2)


def test_interval_widens_with_its_level():
    values, groups = clustered(np.random.default_rng(9), slides=30, questions=2, spread=1.0)
    assert width(mean_interval(values, groups, REAL, level=0.5)) < width(
        mean_interval(values, groups, REAL, level=0.99)
    )


def test_slide_counts_by_its_questions():
    found = mean_interval([1, 1, 1, 0] * 9, [f"{i // 4}{'b' if i % 4 == 3 else 'a'}" for i in range(36)])
    assert found.estimate == 0.75
    assert 0.4 < found.low < 0.75 < found.high < 0.95


def test_where_all_slides_are_alike_the_interval_is_as_wide_as_what_may_be_unseen():
    unseen = 1 - 0.025 ** (1 / 24)  # Clopper and Pearson's for 24 of 24
    groups = np.repeat(np.arange(24), 3)
    assert mean_interval(np.ones(72), groups) == pytest.approx((1, 1 - unseen, 1))
    assert mean_interval(np.ones(72), groups)[1:] == pytest.approx(proportion_interval(24, 24)[1:])
    assert mean_interval(np.zeros(72), groups) == pytest.approx((0, 0, unseen))
    assert mean_interval(np.full(24, 0.3)) == pytest.approx((0.3, 0.3 * (1 - unseen), 0.3 * (1 - unseen) + unseen))
    assert paired_interval(np.ones(72), np.ones(72), groups) == pytest.approx((0, -unseen, unseen))
    assert paired_interval(np.ones(24), np.zeros(24)) == pytest.approx((1, 1 - 2 * unseen, 1))
    assert mean_interval(np.full(24, 5.0), bounds=REAL) == (5, -math.inf, math.inf)  # nothing limits the unseen


def test_coverage_is_nominal_where_every_slide_may_look_alike():
    """Recall that is 1 but on 4 % of slides: half of the samples of 16 are all ones."""
    rng, hits = np.random.default_rng(21), 0
    for seed in range(300):
        values = np.where(rng.random(16) < 0.04, 0.2, 1.0)
        found = mean_interval(values, seed=seed, draws=400)
        hits += found.low <= 0.968 <= found.high
    assert hits / 300 >= 0.94


def test_one_slide_says_next_to_nothing():
    assert mean_interval([True, False, True, True], ["a"] * 4) == pytest.approx((0.75, 0.025 * 0.75, 1 - 0.025 * 0.25))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("groups", [None, [number // 3 for number in range(37)]])
def test_interval_of_equal_values_holds_the_estimate_in_spite_of_rounding(value, groups):
    found = mean_interval([value] * 37, groups)
    assert found.low <= found.estimate <= found.high
    assert found.estimate == pytest.approx(value)
    assert width(found) == pytest.approx(1 - 0.025 ** (1 / (37 if groups is None else 13)))


@pytest.mark.parametrize("level", [0.01, 0.95, 0.999999])
@pytest.mark.parametrize("values", [np.exp(np.arange(10)), -np.exp(np.arange(10)), [0.0, 1.5], [0.0] * 99 + [1e9]])
def test_interval_of_skewed_values_holds_the_estimate(values, level):
    found = mean_interval(values, bounds=REAL, level=level)
    assert min(values) <= found.low <= found.estimate <= found.high <= max(values)


def test_interval_errors():
    with pytest.raises(ValueError, match="found no question, wanted at least one"):
        mean_interval([], [])
    with pytest.raises(ValueError, match="found no question, wanted at least one"):
        paired_interval([], [], [])
    with pytest.raises(ValueError, match="groups: found 1, wanted 2, one for each question"):
        mean_interval([1, 0], ["a"])
    with pytest.raises(ValueError, match="second: found 1 questions, wanted 2"):
        paired_interval([1, 0], [1], ["a", "b"])
    with pytest.raises(ValueError, match=r"values: found shape \[1, 2\]"):
        mean_interval([[1, 0]], ["a"])
    with pytest.raises(ValueError, match="values: found 1 NaN or infinite"):
        mean_interval([1, math.nan], ["a", "b"])
    with pytest.raises(ValueError, match="draws: found 0"):
        mean_interval([1, 0], ["a", "b"], draws=0)
    with pytest.raises(ValueError, match="values: found 0 to 2, wanted 0 to 1"):
        mean_interval([2, 0])
    for successes, n in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match=f"found {successes} successes of {n}"):
            proportion_interval(successes, n)
    with pytest.raises(ValueError, match="level: found 1"):
        proportion_interval(1, 2, level=1)
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=f"level: found {level}"):
            mean_interval([1, 0], ["a", "b"], level=level)


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


# ---- Sign flips


def test_p_of_the_paired_test_is_that_of_mcnemar_for_right_and_wrong_and_of_slides_where_they_have_many_questions():
    first, second = answers(10, 9, 1, 4)
    assert paired_p(first, second) == paired_p(first, second, range(24)) == mcnemar(first, second)
    grouped = paired_p(first, second, [0] * 10 + [1] * 9 + [2] + [3] * 4)  # 9 of the 10 differ on one slide
    assert grouped == 1.0
    assert mcnemar(first, second) < 0.03


def test_sign_flips_of_ones_are_mcnemars_test():
    """The same numbers, counted instead of in closed form."""
    first, second = answers(3, 7, 2, 5)
    scores = np.array(first) * 2.0, np.array(second) * 2.0
    assert paired_p(*scores) == pytest.approx(mcnemar(first, second))


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_least_p_of_few_seeds_is_two_of_all_sign_patterns(n):
    values = np.linspace(0.5, 0.9, n)
    assert paired_p(values, np.zeros(n)) == 2 / 2**n
    assert paired_p(np.zeros(n), values) == 2 / 2**n


def test_paired_test_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(22)
    for n in (8, 40):  # all patterns, random patterns
        first, second = rng.random((2, n)) + np.array([[0.15], [0]])
        options = {"permutation_type": "samples", "n_resamples": 9999, "rng": 0}
        wanted = stats.permutation_test((first, second), lambda x, y, axis: (x - y).sum(axis), **options).pvalue
        assert paired_p(first, second) == pytest.approx(wanted, abs=0.015 if n == 40 else 1e-12)


def test_p_is_never_zero():
    values = np.linspace(0.5, 0.9, 100)
    assert paired_p(values, np.zeros(100)) == 1 / 10_000
    assert paired_p(values, np.zeros(100), draws=99) == 1 / 100
    assert paired_p(np.ones(5000), np.zeros(5000)) > 0  # 2 / 2^5000 is below every float


def test_p_without_a_difference_is_one():
    assert paired_p([0.5, 0.7], [0.5, 0.7]) == 1
    assert paired_p([0.5, 0.7], [0.7, 0.5], ["a", "a"]) == 1


def test_p_of_the_paired_test_takes_neither_order_nor_sides_nor_units_into_account():
    rng = np.random.default_rng(23)
    first, second, order = rng.random(12), rng.random(12), rng.permutation(12)
    wanted = paired_p(first, second)
    assert paired_p(first[order], second[order]) == paired_p(second, first) == wanted
    assert paired_p(1e-7 * first, 1e-7 * second) == wanted
    assert paired_p(1e7 * first, 1e7 * second) == wanted


def test_false_alarms_of_the_paired_test_are_at_most_nominal():
    rng = np.random.default_rng(24)
    groups = np.repeat(np.arange(10), 4)
    ps = [paired_p(*(rng.random((2, 40)) + rng.random((2, 10))[:, groups]), groups) for _ in range(400)]
    assert np.mean(np.array(ps) <= 0.05) < 0.08
    assert np.mean(np.array(ps) <= 0.5) > 0.4


def test_paired_test_errors():
    with pytest.raises(ValueError, match="found no question"):
        paired_p([], [])
    with pytest.raises(ValueError, match="second: found 1 questions, wanted 2"):
        paired_p([1, 0], [1])
    with pytest.raises(ValueError, match="first: found 1 NaN or infinite"):
        paired_p([math.nan], [1])
    with pytest.raises(ValueError, match="draws: found 0"):
        paired_p([1, 0], [0, 1], draws=0)
    with pytest.raises(ValueError, match="groups: found 1, wanted 2"):
        paired_p([1, 0], [0, 1], ["a"])


# ---- Many tests


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_refuses_what_is_no_p():
    for bad in (math.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"wanted each in \[0, 1\]"):
            holm([0.5, bad])


def test_text_of_a_p_is_never_zero():
    assert [p_text(p) for p in (1.0, 0.0625, 0.0444, 1e-4, 9.9e-5, 2e-308)] == [
        "1", "0.062", "0.044", "0.0001", "< 0.0001", "< 0.0001",
    ]  # fmt: skip


# ---- Import


def test_module_adds_nothing_but_numpy_at_import():
    code = (
        "import sys, vllm_wsi; before = set(sys.modules); import vllm_wsi.stats;"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(added & {'numpy', 'scipy', 'sklearn', 'torch', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"
