"""Both kernels behind `score_topk`'s own dispatch: what the CUDA path gives is what the CPU path gives."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from vllm_wsi.kernels import ScorerWeights, cuda, op, score, score_topk
from vllm_wsi.kernels.buffers import Workspace
from vllm_wsi.kernels.launch_table import Card, FusedConfig, fused_config
from vllm_wsi.kernels.reference import score_patches, select_topk
from vllm_wsi.kernels.select import select_triton

from .conftest import INTERPRETED
from .test_score import TOLERANCE, exact, features, scorer


def small_blocks(*args) -> FusedConfig | None:
    """The interpreter sorts slowly."""
    found = fused_config(*args)
    return found and found._replace(block=64)


@pytest.fixture
def launches(request) -> str:
    """One launch, but for the tests that ask for both ways."""
    return getattr(request, "param", "one launch")


both_ways = pytest.mark.parametrize("launches", ["one launch", "two launches"], indirect=True)


@pytest.fixture
def on_device(monkeypatch, device, launches):
    """`score_topk` on the device; in the interpreter, by the CUDA path on CPU tensors."""
    if INTERPRETED:
        monkeypatch.setattr(op, "_on_cpu", op._on_cuda)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        for module in (cuda, score):
            monkeypatch.setattr(module, "card_of", lambda device: Card(89, 3))
        monkeypatch.setattr(cuda, "stream_workspace", Workspace)
        monkeypatch.setattr(cuda, "select_triton", partial(select_triton, block=64))
        monkeypatch.setattr(cuda, "fused_config", small_blocks if launches == "one launch" else lambda *_: None)
    elif launches == "two launches":
        monkeypatch.setattr(cuda, "fused_config", lambda *_: None)

    def run(x, weights, k, cu_seqlens=None, **options):
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(device)
        return score_topk(x.to(device), weights.to(device), k, cu_seqlens=cu_seqlens, **options)

    return run


def whole_numbers(h, generator):
    """Features of +-1 with mean 0 and deviation 1, and whole weights: no step rounds, LayerNorm and GELU included.

    A hidden unit is an odd multiple of 8, where GELU gives the number itself or 0 in fp32.
    """

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=generator).float()

    signs = torch.tensor([1.0, -1.0]).repeat(128)
    x = torch.stack([signs[torch.randperm(256, generator=generator)] for _ in range(90)])
    hidden = None if h == 0 else 16 * integers(h, 256)
    if hidden is not None:
        hidden[:, 128:] = -hidden[:, :128]  # columns that are centred already
    bias = None if h == 0 else torch.full((h,), 8.0)
    return x, ScorerWeights(torch.ones(256), torch.zeros(256), hidden, bias, integers(h or 256), torch.tensor(2.0), 0.0)


@both_ways
@pytest.mark.parametrize("h", [0, 16])
def test_whole_numbers_give_equal_bits_on_both_devices(h, dtype, on_device):
    x, weights = whole_numbers(h, torch.Generator().manual_seed(0))
    x, cu_seqlens, by_score = x.to(dtype), torch.tensor([0, 40, 40, 90]), h == 0
    scores = score_patches(x, weights)  # PyTorch's LayerNorm divides by 3 on the way to a variance of 1
    assert (scores - scores.round()).abs().max() < 1e-3
    wanted = select_topk(scores.round(), 32, x, cu_seqlens, by_score=by_score)
    found = on_device(x, weights, 32, cu_seqlens, by_score=by_score)
    assert torch.equal(found.all_scores.cpu(), scores.round())
    assert 20 < len(found.all_scores.unique()) < len(x)
    for one, other in zip(found[:4], wanted, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize(("d", "h", "k"), [(96, 16, 32), (96, 0, 32), (256, 16, 300), (2624, 16, 3)])
def test_shapes_that_a_kernel_does_not_take_fall_back(d, h, k, on_device):
    module, x = scorer(d, h), features(400, d)
    found, wanted = on_device(x, module.weights(), k), score_topk_on_cpu(x, module.weights(), k)
    assert torch.allclose(found.all_scores.cpu(), wanted.all_scores, atol=1e-5)
    if INTERPRETED and k <= 256:  # the same arithmetic, so that nothing may differ
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("h", [0, 64])
def test_near_ties_differ_from_float64_only_within_the_tolerance(h, dtype, on_device):
    module = scorer(256, h)
    x = (features(8, 256).repeat(40, 1) + 1e-3 * features(320, 256, seed=1)).to(dtype)
    scores, k = exact(module, x), 33
    kept = on_device(x, module.weights(), k).indices[0].cpu()
    assert len(kept.unique()) == k
    tolerance = 2 * TOLERANCE[dtype] * scores.std()
    threshold = scores.topk(k).values[-1]
    assert (scores[kept] >= threshold - tolerance).all()
    left = torch.ones(len(x), dtype=torch.bool)
    left[kept] = False
    assert (scores[left] <= threshold + tolerance).all()


def score_topk_on_cpu(x, weights, k):
    return ON_CPU(x, weights, k, None, 0, None, False)


ON_CPU = op._on_cpu  # before any test replaces it
