"""The tests of two runs against statsmodels, on tables that are known."""

import numpy as np
import pytest

from vllm_wsi.stats import bootstrap_mean, mcnemar


@pytest.mark.parametrize("table", [(101, 59, 121, 33), (10, 3, 1, 5), (0, 12, 12, 0), (7, 0, 5, 2), (40, 25, 43, 900)])
def test_mcnemar_is_that_of_statsmodels(table):
    reference = pytest.importorskip("statsmodels.stats.contingency_tables").mcnemar
    both, only_first, only_second, neither = table
    first = np.repeat([1, 1, 0, 0], table)
    second = np.repeat([1, 0, 1, 0], table)
    wanted = reference([[both, only_first], [only_second, neither]], exact=True)
    assert mcnemar(first, second) == pytest.approx(wanted.pvalue, rel=1e-9)


def test_an_interval_over_single_questions_is_near_wilsons():
    proportion = pytest.importorskip("statsmodels.stats.proportion").proportion_confint
    right = np.arange(1473) < 1080  # the paper's overall number
    found = bootstrap_mean(right, range(1473), draws=8000)
    low, high = proportion(1080, 1473, method="wilson")
    assert found.estimate == pytest.approx(0.7332, abs=5e-5)
    assert found.low == pytest.approx(low, abs=0.002)
    assert found.high == pytest.approx(high, abs=0.002)
