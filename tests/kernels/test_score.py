"""score_triton: right to rounding, and bitwise independent of everything but the row."""

import math

import pytest
import torch
from vllm_wsi.kernels.score import ScoreConfig, fold_scorer, score_config, score_triton, supports

from vllm_wsi.sparsify.scorer import seeded_scorer

from .conftest import INTERPRETED

CONFIG = {0: ScoreConfig(16, 64, 4, 1)}
SMALL = ScoreConfig(64, 64, 4, 2)
TOLERANCE = {torch.float32: 6e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def scorer(d, h, seed=0):
    """A scorer whose LayerNorm is not the identity."""
    module = seeded_scorer("patch", d, h, seed).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    module.norm.weight.copy_(1 + 0.2 * torch.randn(d, generator=generator))
    module.norm.bias.copy_(0.2 * torch.randn(d, generator=generator))
    return module


def features(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def exact(module, x):
    """Scores in float64, by the formula of `PatchScorer`."""
    module = module.cpu().double()
    x = x.cpu().double()
    y = torch.nn.functional.layer_norm(x, x.shape[1:], module.norm.weight, module.norm.bias, module.norm.eps)
    y = module.out(y if module.hidden is None else torch.nn.functional.gelu(module.hidden(y)))[:, 0]
    module.float()
    return y


def run(module, x, config=None):
    weights = module.weights().to(x.device)
    h = 0 if module.hidden is None else module.hidden.out_features
    return score_triton(x, fold_scorer(weights, x.dtype), config or CONFIG.get(h, SMALL))


@pytest.mark.parametrize("h", [0, 16, 64, 128, 192, 256, 512])
@pytest.mark.parametrize("d", [256, 320, 512])
def test_scores_agree_with_float64(d, h, dtype, device):
    if INTERPRETED and d == 320 and h not in (0, 64):
        pytest.skip("the same code at another d; the interpreter is slow")
    module, x = scorer(d, h), features(130, d).to(device, dtype)
    wanted = exact(module, x)
    error = (run(module, x).cpu() - wanted).abs().max() / wanted.std()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("d", [768, 1536, 2560])
def test_scores_agree_with_float64_at_the_encoders_sizes(d, device):
    module, x = scorer(d, 64), features(70, d).to(device, torch.float16)
    wanted = exact(module, x)
    assert (run(module, x).cpu() - wanted).abs().max() / wanted.std() < TOLERANCE[torch.float16]


@pytest.mark.parametrize("h", [0, 64])
def test_a_mean_of_thirty_deviations_costs_no_accuracy_that_the_dtype_has(h, device):
    module, x = scorer(256, h), (features(100, 256) + 30).to(device)
    wanted = exact(module, x)
    assert (run(module, x).cpu() - wanted).abs().max() / wanted.std() < 4e-5


def test_gelu_is_exact_to_two_millionths(device):
    """Through the kernel itself: a scorer whose hidden unit j is z, and whose output takes that unit alone."""
    module = scorer(256, 16)
    module.out.weight.zero_()
    module.out.weight[0, 3] = 1.0
    module.out.bias.zero_()
    for scale in (0.1, 1.0, 3.0, 8.0, 30.0):
        module.hidden.bias.copy_(torch.linspace(-scale, scale, 16))
        x = features(200, 256, seed=int(scale * 10)).to(device)
        z = (
            module.cpu()
            .double()
            .hidden(torch.nn.functional.layer_norm(x.cpu().double(), (256,), module.norm.weight, module.norm.bias))[
                :, 3
            ]
        )
        module.float()
        wanted = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
        assert (run(module, x).cpu() - wanted).abs().max() < 2e-6 + 2e-6 * scale


@pytest.mark.parametrize("h", [0, 64])
@pytest.mark.parametrize("n", [0, 1, 15, 63, 64, 65, 300])
def test_a_row_scores_the_same_alone_in_a_batch_and_at_any_place(n, h, dtype, device):
    module, x = scorer(256, h), features(n, 256).to(device, dtype)
    scores = run(module, x)
    assert scores.shape == (n,)
    if n:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).to(device)
        assert torch.equal(run(module, x[order]), scores[order])
        assert torch.equal(run(module, x[n // 2 : n // 2 + 1]), scores[n // 2 : n // 2 + 1])
        assert torch.equal(run(module, x[n // 3 :]), scores[n // 3 :])


@pytest.mark.parametrize("h", [0, 64])
def test_repeats_change_no_bit(h, device):
    module, x = scorer(256, h), features(100, 256).to(device, torch.float16)
    first = run(module, x)
    for _ in range(5 if INTERPRETED else 100):
        assert torch.equal(run(module, x), first)


@pytest.mark.parametrize("h", [0, 64])
def test_a_strided_matrix_scores_as_its_copy(h, dtype, device):
    module, wide = scorer(256, h), features(100, 300).to(device, dtype)
    x = wide[:, :256]
    assert torch.equal(run(module, x), run(module, x.clone()))


@pytest.mark.parametrize("h", [0, 64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_scores_nan_and_touches_no_other(h, value, device):
    module, x = scorer(256, h), features(70, 256).to(device)
    clean = run(module, x)
    for column in (0, 100, 255):
        dirty = x.clone()
        dirty[33, column] = value
        scores = run(module, dirty)
        assert scores[33].isnan()
        others = torch.arange(70, device=device) != 33
        assert torch.equal(scores[others], clean[others])


@pytest.mark.skipif(INTERPRETED, reason="needs 4 GiB on a GPU")
def test_offsets_beyond_two_to_the_thirty_one_elements(device):
    module = scorer(2560, 0)
    x = torch.zeros(2**31 // 2560 + 100, 2560, dtype=torch.float16, device=device)
    x[-50:] = features(50, 2560).to(device, torch.float16)
    assert torch.equal(run(module, x, None)[-50:], run(module, x[-50:].clone(), None))


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("h", [0, 64, 128, 256, 512])
@pytest.mark.parametrize("d", [256, 320, 1536, 2560])
def test_every_static_configuration_divides_d(arch, h, d):
    for dtype in (torch.float16, torch.float32):
        config = score_config(arch, d, h, dtype)
        assert d % config.block_k == 0
        assert config.block_k % 8 == 0


@pytest.mark.parametrize("d", [192, 250, 2624])
def test_other_sizes_are_left_to_the_reference(d):
    assert not supports(torch.zeros(2, d), scorer(d, 16).weights())
    assert supports(torch.zeros(2, 256), scorer(256, 16).weights())
    assert not supports(torch.zeros(2, 256, dtype=torch.float64), scorer(256, 16).weights())
    assert not supports(torch.zeros(256, 256).T, scorer(256, 16).weights())
