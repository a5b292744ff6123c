"""Evenly spaced rows: how many, and how far apart."""

import pytest
import torch

from vllm_wsi.selection.evenly_spaced import evenly_spaced

SIZES = [(1, 1), (9, 5), (9, 9), (9, 10), (4096, 4097), (4096, 100_003), (2, 17), (32, 320)]


@pytest.mark.parametrize(("k", "n"), SIZES)
def test_rows_are_equally_far_apart_and_as_far_from_either_end(k, n):
    rows = evenly_spaced(k, n)
    assert rows.dtype == torch.int64
    assert len(rows) == min(k, n)
    if n <= k:
        assert torch.equal(rows, torch.arange(n))
    else:
        assert set(torch.diff(rows).tolist()) <= {n // k, n // k + 1}
        assert abs(int(rows[0]) - (n - 1 - int(rows[-1]))) <= 1


def test_a_row_is_the_middle_one_of_its_part():
    assert evenly_spaced(3, 9).tolist() == [1, 4, 7]
    assert evenly_spaced(3, 12).tolist() == [2, 6, 10]
    assert evenly_spaced(2, 5).tolist() == [1, 3]
