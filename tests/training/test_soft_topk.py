"""Soft Top-K: the budget, the order, the gradient, the hard limit, short rows and padding."""

import math

import pytest
import torch
from torch import Tensor

from vllm_wsi.training.soft_topk import soft_topk

CDFS = {
    "laplace": lambda x: torch.where(x < 0, torch.exp(-x.abs()) / 2, 1 - torch.exp(-x.abs()) / 2),
    "logistic": torch.sigmoid,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Rows this small gain nothing from threads, and lose much where another process holds the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bisection_topk(
    scores: Tensor, k: Tensor | int, tau: float, mask: Tensor | None = None, cdf: str = "laplace"
) -> Tensor:
    """alpha_i = F(s_i / tau - b), sum(alpha) = min(k, patches), with b found by bisection; fp64, same arguments."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    u = scores.double().masked_fill(~mask, -torch.inf) / tau
    n = mask.sum(-1, keepdim=True)
    k = torch.as_tensor(k).expand(scores.shape[:-1])[..., None]
    low = u.masked_fill(~mask, torch.inf).amin(-1, keepdim=True) - 60
    high = u.amax(-1, keepdim=True) + 60
    for _ in range(80):
        middle = (low + high) / 2
        too_low = CDFS[cdf](u - middle).sum(-1, keepdim=True) > k
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.where(n <= k, mask.double(), CDFS[cdf](u - (low + high) / 2).masked_fill(~mask, 0))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.3


def gradient(scores: Tensor, weights: Tensor, *args, **kwargs) -> Tensor:
    scores = scores.clone().requires_grad_()
    (soft_topk(scores, *args, **kwargs) * weights).sum().backward()
    assert scores.grad is not None
    return scores.grad


def hard_mask(scores: Tensor, k: int) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, scores.topk(k).indices, 1)


@pytest.mark.parametrize("tau", [1e-4, 0.02, 0.1, 0.5, 2.0, 50.0])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (33, 32), (256, 32), (4096, 256), (4096, 4095), (100_000, 32)])
def test_alpha_lies_in_the_unit_interval_and_sums_to_k(n, k, tau):
    for seed, scale in enumerate((1.0, 1e-3, 1.0 if tau < 0.02 else 1e4 * tau)):
        alpha = soft_topk(normal(2, n, seed=seed) * scale, k, tau)
        assert alpha.dtype == torch.float32
        assert alpha.min() >= 0
        assert alpha.max() <= 1
        assert (alpha.double().sum(-1) - k).abs().max() < 1e-4


@pytest.mark.parametrize("k", [1, 32, 1000, 50_000, 99_999])
def test_the_budget_holds_for_any_k_of_100k_patches(k):
    for tau in (0.02, 0.1, 2.0):
        alpha = soft_topk(normal(100_000), k, tau)
        assert abs(alpha.double().sum().item() - k) < 1e-4


@pytest.mark.parametrize("tau", [0.02, 0.1, 1.0, 2.0])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (3, 2), (40, 32), (256, 32), (1024, 256), (100_000, 32)])
def test_alpha_is_that_of_a_laplace_bisection_in_fp64(n, k, tau):
    scores = normal(1 if n > 10_000 else 4, n, seed=n)
    assert (soft_topk(scores, k, tau) - bisection_topk(scores, k, tau)).abs().max() < 1e-7


@pytest.mark.parametrize("tau", [0.02, 0.1, 2.0])
def test_masked_rows_of_unlike_k_are_those_of_a_laplace_bisection_in_fp64(tau):
    scores, mask = normal(3, 4, 128), random_mask(3, 4, 128)
    k = torch.randint(1, 128, (3, 4), generator=torch.Generator().manual_seed(1))
    assert (mask.sum(-1) <= k).any()
    alpha = soft_topk(scores, k, tau, mask)
    assert (alpha - bisection_topk(scores, k, tau, mask)).abs().max() < 1e-7
    assert torch.allclose(alpha.double().sum(-1), torch.minimum(k, mask.sum(-1)).double(), atol=1e-4)


def test_tau_may_differ_between_rows():
    scores, tau = normal(3, 100), torch.tensor([0.1, 0.5, 2.0])
    alpha = soft_topk(scores, 8, tau)
    for row in range(3):
        assert torch.equal(alpha[row], soft_topk(scores[row], 8, tau[row]))


@pytest.mark.parametrize("tau", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("n", [33, 64, 512])
def test_alpha_stays_near_a_logistic_bisection_and_has_its_order(n, tau):
    scores = normal(4, n, seed=3)
    alpha, logistic = soft_topk(scores, 32, tau).double(), bisection_topk(scores, 32, tau, cdf="logistic")
    assert (alpha - logistic).abs().max() < 0.25
    order = logistic.argsort(-1)
    assert (alpha.gather(-1, order).diff() >= -1e-6).all()


@pytest.mark.parametrize("tau", [1e-4, 0.1, 2.0])
@pytest.mark.parametrize(("n", "k"), [(50, 7), (1024, 32), (100_000, 32)])
def test_a_higher_score_never_has_a_lower_alpha(n, k, tau):
    ascending = normal(n, seed=k).sort().values
    alpha = soft_topk(ascending, k, tau)
    assert (alpha.diff() >= 0).all()
    if tau >= 0.1 and n < 10_000:
        assert alpha[-1] > alpha[0]


def test_the_hard_mask_is_the_limit_of_small_tau():
    scores = torch.stack([torch.randperm(1000, generator=torch.Generator().manual_seed(i)) for i in range(4)]) / 1000.0
    hard = hard_mask(scores, 32)
    errors = [(soft_topk(scores, 32, tau) - hard).abs().max().item() for tau in (1e-2, 1e-3, 3e-4, 1e-4, 1e-6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 5e-3
    assert errors[4] == 0
    assert (bisection_topk(scores, 32, 1e-6, cdf="logistic") - hard).abs().max() < 1e-12


@pytest.mark.parametrize("value", [0.0, -3.0, 1e4])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (64, 32), (1000, 7), (100_000, 32)])
def test_a_constant_row_shares_the_budget_evenly(n, k, value):
    for tau in (1e-4, 0.1, 2.0):
        assert torch.allclose(soft_topk(torch.full((n,), value), k, tau), torch.tensor(k / n))
        assert gradient(torch.full((n,), value), torch.ones(n), k, tau).abs().max() < 1e-5 / tau


def test_ties_have_equal_alpha():
    scores = torch.randint(0, 8, (6, 300), generator=torch.Generator().manual_seed(0)).float()
    for tau in (1e-3, 0.1, 1.0):
        alpha = soft_topk(scores, 32, tau)
        assert (alpha - bisection_topk(scores, 32, tau)).abs().max() < 1e-7
        for row in range(6):
            assert len(alpha[row].unique()) <= len(scores[row].unique())
            assert all(len(alpha[row][scores[row] == s].unique()) == 1 for s in range(8))


def test_a_shift_of_all_scores_changes_nothing():
    scores = torch.randint(-1000, 1000, (4, 200), generator=torch.Generator().manual_seed(0)) / 256
    for shift in (1.0, -64.0, 1024.0):
        assert torch.equal(soft_topk(scores + shift, 32, 0.1), soft_topk(scores, 32, 0.1))


def test_permuted_scores_give_permuted_alpha_and_gradient():
    scores, weights, order = normal(300), normal(300, seed=1), normal(300, seed=2).argsort()
    assert torch.equal(soft_topk(scores[order], 32, 0.1), soft_topk(scores, 32, 0.1)[order])
    moved = gradient(scores[order], weights[order], 32, 0.1)
    assert torch.allclose(moved, gradient(scores, weights, 32, 0.1)[order], atol=1e-6)


@pytest.mark.parametrize("spread", [1e4, 3e38])
def test_outlying_scores_neither_overflow_nor_break_the_budget(spread):
    scores = normal(500)
    for outliers in (1, 32, 40, 499):
        for sign in (-1, 1):
            row = scores.clone()
            row[:outliers] = sign * spread
            for tau in (1e-4, 1.0, 100.0):
                alpha = soft_topk(row, 32, tau)
                assert (alpha - bisection_topk(row.clamp(-1e6, 1e6), 32, tau)).abs().max() < 1e-6
                assert abs(alpha.double().sum().item() - 32) < 1e-4
                assert gradient(row, scores, 32, tau).isfinite().all()


@pytest.mark.parametrize("k", [1, 6, 11])
@pytest.mark.parametrize("tau", [0.1, 0.7, 2.0])
def test_the_gradient_passes_gradcheck_in_fp64(k, tau):
    scores, mask = normal(2, 2, 16, seed=k).double().requires_grad_(), random_mask(2, 2, 16)
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, k, tau), scores)
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, k, tau, mask), scores)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_the_gradient_is_the_finite_difference_of_the_bisection(tau):
    scores, mask, weights = normal(3, 40, seed=5), random_mask(3, 40), normal(3, 40, seed=6)
    k = torch.tensor([1, 12, 40])
    step = 1e-5
    moved = scores.double()[:, None] + step * torch.eye(40).double() * torch.tensor([-1.0, 1.0])[:, None, None, None]
    alpha = bisection_topk(moved, k[:, None], tau, mask[:, None].expand(3, 40, 40))
    below, above = (alpha * weights[:, None]).sum(-1)
    expected = (above - below) / (2 * step)
    assert (gradient(scores, weights, k, tau, mask) - expected).abs().max() < 2e-6 / tau


def test_the_gradient_sums_to_zero_since_the_budget_is_fixed():
    for n in (64, 4096):
        found = gradient(normal(4, n), normal(4, n, seed=1), 32, 0.1)
        assert found.abs().sum() > 1
        assert found.sum(-1).abs().max() < 1e-4


def test_the_gradient_is_differentiable_once():
    scores = normal(50).requires_grad_()
    (first,) = torch.autograd.grad(soft_topk(scores, 8, 0.5).square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_an_infinite_gradient_at_a_vanished_alpha_does_not_reach_the_scores():
    scores = torch.tensor([0.0, 1.0, 2.0, -1e4]).requires_grad_()
    alpha = soft_topk(scores, 2, 0.5)
    assert alpha[3] == 0
    alpha.sqrt().sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("n", [0, 1, 31, 32])
def test_a_row_of_at_most_k_patches_is_kept_whole_with_a_zero_gradient(n):
    assert torch.equal(soft_topk(normal(3, n), 32, 0.1), torch.ones(3, n))
    assert torch.equal(gradient(normal(3, n), normal(3, n, seed=1), 32, 0.1), torch.zeros(3, n))


@pytest.mark.parametrize("k", [1, 2, 32])
def test_a_row_of_k_plus_one_patches_shares_the_budget(k):
    scores = normal(5, k + 1, seed=k)
    alpha = soft_topk(scores, k, 0.5)
    assert (alpha - bisection_topk(scores, k, 0.5)).abs().max() < 1e-7
    assert (alpha < 1).all()
    assert gradient(scores, normal(5, k + 1, seed=1), k, 0.5).abs().max() > 0


def test_a_batch_without_rows_is_empty():
    assert soft_topk(torch.empty(0, 40), 32, 0.1).shape == (0, 40)


@pytest.mark.parametrize("n_valid", [0, 1, 31, 32])
def test_a_padded_row_of_at_most_k_patches_keeps_them_all_and_no_padding(n_valid):
    mask = (torch.arange(40) < n_valid).expand(2, 40)
    assert torch.equal(soft_topk(normal(2, 40), 32, 0.1, mask), mask.float())
    assert torch.equal(gradient(normal(2, 40), normal(2, 40, seed=1), 32, 0.1, mask), torch.zeros(2, 40))


@pytest.mark.parametrize("n_valid", [33, 40, 99])
def test_the_patches_of_a_padded_row_have_the_alpha_and_gradient_of_the_row_alone(n_valid):
    place = torch.randperm(100, generator=torch.Generator().manual_seed(n_valid))[:n_valid].sort().values
    mask = torch.zeros(100, dtype=torch.bool)
    mask[place] = True
    scores, weights = normal(100, seed=2) * 3, normal(100, seed=3)
    alpha = soft_topk(scores, 32, 0.1, mask)
    assert torch.equal(alpha[place], soft_topk(scores[place], 32, 0.1))
    assert torch.equal(alpha[~mask], torch.zeros(100 - n_valid))
    found = gradient(scores, weights, 32, 0.1, mask)
    assert torch.allclose(found[place], gradient(scores[place], weights[place], 32, 0.1), atol=1e-6)
    assert torch.equal(found[~mask], torch.zeros(100 - n_valid))


@pytest.mark.parametrize("content", [1e4, -1e4, 3e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("k", [1, 32, 90])
def test_the_content_of_padding_changes_no_bit(content, k):
    mask = random_mask(3, 100)
    mask[2] = False
    scores, weights = normal(3, 100), normal(3, 100, seed=1)
    spoilt = scores.masked_fill(~mask, content)
    assert torch.equal(soft_topk(spoilt, k, 0.1, mask), soft_topk(scores, k, 0.1, mask))
    found = gradient(spoilt, weights.masked_fill(~mask, math.nan), k, 0.1, mask)
    assert torch.equal(found, gradient(scores, weights, k, 0.1, mask))
    assert not found[~mask].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_worked_out_in_fp32_and_get_a_gradient_of_their_dtype(dtype):
    scores, weights = normal(2, 200).to(dtype), normal(2, 200, seed=1)
    alpha = soft_topk(scores, 32, 0.1)
    assert alpha.dtype == torch.float32
    assert torch.equal(alpha, soft_topk(scores.float(), 32, 0.1))
    found = gradient(scores, weights, 32, 0.1)
    assert found.dtype == dtype
    assert torch.equal(found, gradient(scores.float(), weights, 32, 0.1).to(dtype))


def test_autocast_changes_no_bit():
    scores, weights = normal(2, 200), normal(2, 200, seed=1)
    alpha, found = soft_topk(scores, 32, 0.1), gradient(scores, weights, 32, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_topk(scores, 32, 0.1), alpha)
        assert torch.equal(gradient(scores, weights, 32, 0.1), found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: found 0, wanted at least 1"),
        ({"k": torch.tensor([3, -1])}, "k: found -1, wanted at least 1"),
        ({"k": torch.tensor([3, 3, 3])}, "k: found torch.int64 [3]"),
        ({"k": 2.5}, "k: found torch.float32"),
        ({"tau": 0.0}, "tau: found 0.0, wanted above 0"),
        ({"tau": -1.0}, "tau: found -1.0, wanted above 0"),
        ({"tau": math.nan}, "tau: found nan, wanted above 0"),
        ({"tau": torch.ones(3)}, "tau: found shape [3]"),
        ({"mask": torch.ones(2, 9, dtype=torch.bool)}, "mask: found torch.bool [2, 9]"),
        ({"mask": torch.ones(2, 10)}, "mask: found torch.float32 [2, 10]"),
        ({"scores": torch.arange(10)}, "scores: found torch.int64 [10]"),
        ({"scores": torch.tensor(1.0)}, "scores: found torch.float32 []"),
    ],
)
def test_wrong_arguments_are_told(change, message):
    arguments = {"scores": normal(2, 10), "k": 3, "tau": 0.1, **change}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        soft_topk(**arguments)
    assert message in str(caught.value)
