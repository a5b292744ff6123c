"""vectors_triton: right to rounding, each number that of a scorer with one output; nothing but the row counts."""

import pytest
import torch

from vllm_wsi.kernels.launch_table import LaunchConfig
from vllm_wsi.kernels.reference import MAX_MAGNITUDE, ScorerWeights
from vllm_wsi.kernels.score import score_triton
from vllm_wsi.kernels.self_check import exact_scores
from vllm_wsi.kernels.vectors import vectors_triton

CONFIG = LaunchConfig(64, 64, 4, 2)


def scorer(d, h, rank, device="cpu", seed=0) -> ScorerWeights:
    """With a LayerNorm that is not the identity."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return ScorerWeights(
        1 + 0.2 * normal(d), 0.2 * normal(d), normal(h, d) * d**-0.5, 0.1 * normal(h), normal(rank, h) * h**-0.5,
        0.1 * normal(rank),
    ).to(device)  # fmt: skip


def features(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("d", "h", "rank"), [(256, 16, 1), (256, 64, 16), (320, 128, 5), (256, 200, 16)])
def test_vectors_agree_with_float64(d, h, rank, dtype, device):
    weights, x = scorer(d, h, rank, device), features(130, d).to(device, dtype)
    found = vectors_triton(x, weights, CONFIG)
    exact = exact_scores(x, weights, dtype)
    assert found.shape == exact.scores.shape == (130, rank)
    assert bool(((found - exact.scores).abs() <= exact.tolerance).all())


@pytest.mark.parametrize("rank", [1, 3])
def test_each_number_has_the_bits_of_a_scorer_with_that_one_output(rank, dtype, device):
    weights, x = scorer(256, 64, rank, device), features(70, 256).to(device, dtype)
    found = vectors_triton(x, weights, CONFIG)
    for r in range(rank):
        single = weights._replace(out_weight=weights.out_weight[r], out_bias=weights.out_bias[r])
        assert torch.equal(found[:, r], score_triton(x, single, CONFIG))


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65])
def test_a_row_has_the_same_bits_alone_and_at_any_place(n, device):
    weights, x = scorer(256, 64, 4, device), features(150, 256).to(device, torch.float16)
    whole = vectors_triton(x, weights, CONFIG)
    for start in (0, 7, 85):
        assert torch.equal(vectors_triton(x[start : start + n], weights, CONFIG), whole[start : start + n])
    wide = torch.zeros(150, 300, dtype=x.dtype, device=device)
    wide[:, :256] = x
    assert torch.equal(vectors_triton(wide[:n, :256], weights, CONFIG), whole[:n])


def test_rows_that_are_not_finite_or_too_large_are_nan_in_all_numbers(device):
    x = features(40, 256).to(device)
    x[3, 5], x[17, 0], x[30] = torch.nan, torch.inf, 2 * MAX_MAGNITUDE
    found = torch.isnan(vectors_triton(x, scorer(256, 64, 4, device), CONFIG))
    assert found.any(dim=1).nonzero()[:, 0].tolist() == [3, 17, 30]
    assert found.all(dim=1).sum() == 3


def test_another_d_and_a_scorer_without_a_hidden_layer_are_refused(device):
    weights = scorer(256, 64, 4, device)
    with pytest.raises(ValueError, match="features have size 320"):
        vectors_triton(features(5, 320).to(device), weights)
    linear = weights._replace(hidden_weight=None, hidden_bias=None, out_weight=weights.out_weight[:, :1].expand(4, 256))
    with pytest.raises(ValueError, match="wanted 256 and a hidden layer"):
        vectors_triton(features(5, 256).to(device), linear)
