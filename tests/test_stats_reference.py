"""Intervals and tests against statsmodels, on tables that are known."""

import numpy as np
import pytest

from vllm_wsi.stats import holm, mcnemar, proportion_interval


@pytest.mark.parametrize("table", [(101, 59, 121, 33), (10, 3, 1, 5), (0, 12, 12, 0), (7, 0, 5, 2), (40, 25, 43, 900)])
def test_mcnemar_is_that_of_statsmodels(table):
    reference = pytest.importorskip("statsmodels.stats.contingency_tables").mcnemar
    both, only_first, only_second, neither = table
    first = np.repeat([1, 1, 0, 0], table)
    second = np.repeat([1, 0, 1, 0], table)
    wanted = reference([[both, only_first], [only_second, neither]], exact=True)
    assert mcnemar(first, second) == pytest.approx(wanted.pvalue, rel=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(1080, 1473), (48, 79), (24, 24), (0, 1)])
def test_the_interval_of_a_share_is_that_of_statsmodels(successes, n):
    proportion = pytest.importorskip("statsmodels.stats.proportion").proportion_confint
    found = proportion_interval(successes, n)
    assert found[1:] == pytest.approx(proportion(successes, n, method="beta"), abs=1e-9)
    assert found.estimate == successes / n


def test_holms_correction_is_that_of_statsmodels():
    reference = pytest.importorskip("statsmodels.stats.multitest").multipletests
    ps = np.random.default_rng(0).random(30) ** 4
    assert holm(ps.tolist()) == pytest.approx(reference(ps, method="holm")[1])
