"""ContextScorer: Transformer blocks over the whole slide, then the same Top-K."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_wsi.errors import CheckpointError, SlideError
from vllm_wsi.selection.scorer import ContextScorer, build_scorer, frozen_scorer, seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import features_in_memory

D, K = 24, 8


@pytest.fixture(scope="module")
def scorer() -> ContextScorer:
    return seeded_scorer("context", D, 32, seed=3, num_heads=4)


def matrix(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, D)).astype(np.float32)


def select(scorer: ContextScorer, x: np.ndarray, k: int = K, chunk_rows: int | None = None):
    return SlideSelector(frozen_scorer(scorer), k, chunk_rows=chunk_rows).select(features_in_memory(x))


def test_the_blocks_are_torchs_own_pre_norm_encoder(scorer):
    layers = []
    for block in scorer.blocks:
        layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
        layer.self_attn.in_proj_weight.data, layer.self_attn.in_proj_bias.data = block.qkv.weight, block.qkv.bias
        layer.self_attn.out_proj, layer.linear1, layer.linear2 = block.attention_out, block.up, block.down
        layer.norm1, layer.norm2 = block.attention_norm, block.mlp_norm
        layers.append(layer)
    x = torch.from_numpy(matrix(50))
    tokens = scorer.input(F.layer_norm(x, (D,)))[None]
    for layer in layers:
        tokens = layer(tokens)
    assert torch.allclose(scorer(x), scorer.out(scorer.norm(tokens))[0, :, 0], atol=1e-5)


@pytest.mark.parametrize("n", [1, K - 1, K, K + 1, 700])
def test_the_best_scores_of_the_whole_slide_are_kept_in_ascending_order(scorer, n):
    x = matrix(n)
    selection = select(scorer, x)
    kept = scorer(torch.from_numpy(x)).topk(min(K, n)).indices.sort().values
    assert torch.equal(selection.indices, kept)
    assert np.array_equal(selection.features.numpy(), x[kept.numpy()])
    assert (selection.num_patches, selection.num_nonfinite) == (n, 0)


@pytest.mark.parametrize("chunk_rows", [1, 7, 256, 1000])
def test_the_size_of_chunks_changes_no_bit(scorer, chunk_rows):
    x = matrix(999)
    one, other = select(scorer, x), select(scorer, x, chunk_rows=chunk_rows)
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_kept_rows_have_the_files_own_bits(scorer, dtype):
    x = torch.from_numpy(matrix(300)).to(getattr(torch, dtype))
    raw = x.view(torch.uint16).numpy() if dtype == "bfloat16" else x.numpy()
    slide = features_in_memory(raw, dtype=dtype)
    selection = SlideSelector(frozen_scorer(scorer), K).select(slide)
    assert torch.equal(selection.features, x[selection.indices])


def test_a_patch_that_is_not_finite_is_counted_and_changes_nothing_for_the_others(scorer):
    x = matrix(200)
    spoilt = np.insert(x, 40, np.nan, axis=0)
    spoilt = np.insert(spoilt, 0, np.inf, axis=0)
    selection, clean = select(scorer, spoilt), select(scorer, x)
    assert selection.num_nonfinite == 2
    assert torch.equal(selection.indices, clean.indices + 1 + (clean.indices >= 40))
    with pytest.raises(SlideError, match="no patch with a finite score among 5"):
        select(scorer, np.full((5, D), np.nan, np.float32))


def test_patches_see_each_other_but_never_the_padding(scorer):
    x = torch.from_numpy(matrix(60))
    alone = scorer(x)
    changed = x.clone()
    changed[7] *= -1
    assert (scorer(changed) - alone)[:7].abs().max() > 1e-5
    padded, mask = torch.stack((x, x)), torch.ones(2, 60, dtype=torch.bool)
    padded[1, 40:], mask[1, 40:] = 1e4, False
    scores = scorer(padded, mask)
    assert torch.allclose(scores[0], alone, atol=1e-5)
    assert torch.allclose(scores[1, :40], scorer(x[:40]), atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_memory_grows_with_n_and_not_with_its_square(scorer):
    """PyTorch's attention that keeps N * N weights is switched off: where nothing else fits, it raises."""
    x = torch.from_numpy(matrix(300))
    mask = torch.ones(300, dtype=torch.bool)
    with torch.no_grad(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        assert len(select(scorer, matrix(300)).indices) == K
        assert torch.equal(scorer(x), scorer(x[None])[0])
        assert torch.allclose(scorer(x, mask), scorer(x), atol=1e-5)
        with pytest.raises(RuntimeError, match="No available kernel"):
            F.scaled_dot_product_attention(x, x, x)


def test_gradients_reach_every_parameter_and_a_frozen_copy_has_none(scorer):
    scorer(torch.from_numpy(matrix(9))).sum().backward()
    assert all(p.grad is not None for p in scorer.parameters())
    scorer.zero_grad()
    assert not any(p.requires_grad for p in frozen_scorer(scorer).parameters())


def test_settings_that_no_scorer_has_are_refused():
    with pytest.raises(CheckpointError, match=r"found 33, wanted a multiple of num_heads \(4\)"):
        build_scorer("context", D, 33, num_heads=4)
    with pytest.raises(CheckpointError, match="found num_layers beside kind 'patch'"):
        build_scorer("patch", D, 8, num_layers=2)
    assert len(build_scorer("context", D, 64, num_layers=3).blocks) == 3
