"""Scoring and Hard Top-K in torch: exact indices, and bits that do not depend on how a slide is cut."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from vllm_wsi.kernels import block_rows, score_patches, score_topk
from vllm_wsi.kernels.reference import select_topk
from vllm_wsi.selection.scorer import PatchScorer, build_scorer, seeded_scorer

D = 64
BLOCK = block_rows(D)


def scorer(hidden: int = 32, d: int = D):
    return seeded_scorer("patch", d, hidden, seed=1).requires_grad_(False)


def features(n: int, d: int = D, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def oracle(scores: torch.Tensor, k: int) -> list[int]:
    """Ascending rows of the k best: a stable sort of the finite scores in plain Python."""
    finite = [i for i, s in enumerate(scores.tolist()) if s == s and abs(s) != float("inf")]
    return sorted(sorted(finite, key=lambda i: (-scores[i].item(), i))[:k])


@pytest.mark.parametrize("hidden", [0, 32])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 256])
@pytest.mark.parametrize("n", [1, 31, 32, 33, BLOCK - 1, BLOCK, BLOCK + 1, 5000])
def test_indices_equal_a_stable_sort_of_the_scores(n, k, hidden):
    x, weights = features(n), scorer(hidden).weights()
    top, wanted = score_topk(x, weights, k), oracle(score_patches(x, weights), k)
    m = len(wanted)
    assert top.indices[0].tolist() == wanted + [-1] * (k - m)
    assert torch.equal(top.all_scores, score_patches(x, weights))
    assert torch.equal(top.scores[0, :m], top.all_scores[wanted])
    assert torch.equal(top.rows[0, :m], x[wanted])
    assert not top.rows[0, m:].any()


def test_ties_go_to_the_lower_row_where_all_rows_are_equal():
    x = features(1).expand(3000, D)
    assert score_topk(x, scorer().weights(), 32).indices[0].tolist() == list(range(32))


def test_ties_go_to_the_lower_row_among_a_few_distinct_rows():
    x = features(5).repeat(700, 1)
    weights = scorer().weights()
    assert score_topk(x, weights, 33).indices[0].tolist() == oracle(score_patches(x, weights), 33)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_never_kept_and_is_counted(value):
    x = features(200)
    x[10:190, 3] = value
    top = score_topk(x, scorer().weights(), 32)
    assert top.indices[0].tolist() == [*range(10), *range(190, 200), *[-1] * 12]
    assert torch.isfinite(top.all_scores).sum() == 20


def test_no_patches_keep_none():
    assert score_topk(features(0), scorer().weights(), 3).indices.tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("k", [1, 33, 300])
def test_slides_of_a_batch_and_chunks_of_a_slide_keep_what_each_slide_keeps_alone(k, by_score):
    weights, lengths = scorer().weights(), [0, 700, 1, 40, 0]
    parts = [features(n, seed=n).round(decimals=0) for n in lengths]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    together = score_topk(torch.cat(parts), weights, k, cu_seqlens=cu_seqlens, by_score=by_score)
    for slide, part in enumerate(parts):
        alone = score_topk(part, weights, k, by_score=by_score)
        assert torch.equal(together.indices[slide], alone.indices[0])
        assert torch.equal(together.rows[slide], alone.rows[0])
        running = None
        for start in range(0, max(len(part), 1), 130):
            chunk = part[start : start + 130]
            running = score_topk(chunk, weights, k, first_row=start, running=running, by_score=by_score)
        assert all(torch.equal(one, other) for one, other in zip(running[:4], alone[:4], strict=True))


def test_no_slides_give_empty_results():
    top = score_topk(features(0), scorer().weights(), 3, cu_seqlens=torch.tensor([0]))
    assert [tuple(x.shape) for x in top] == [(0, 3), (0, 3), (0, 3, D), (0, 32), (0,)]


@pytest.mark.parametrize("hidden", [0, 32])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("cut", "by_score"), [(None, False), ([0, 9, 20], True)])
def test_the_operator_passes_pytorchs_own_checks(cut, by_score, streaming, hidden):
    weights = scorer(hidden).weights()
    cu_seqlens = None if cut is None else torch.tensor(cut)
    first_row, before = 0, []
    if streaming:
        running = score_topk(features(20, seed=1), weights, 3, cu_seqlens=cu_seqlens, by_score=by_score)
        first_row, before = 20, [running.indices, running.rows, running.keys]
    arguments = (features(20), weights.tensors(), weights.norm_eps, 3, cu_seqlens, first_row, before, by_score)
    torch.library.opcheck(torch.ops.vllm_wsi.score_topk.default, arguments)


@pytest.mark.parametrize("n", [65_536, 100_000, 1_000_000])
@pytest.mark.parametrize("kind", ["random", "falling", "one bin", "31 finite"])
def test_indices_equal_a_stable_sort_in_large_slides(kind, n):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(0))
    if kind == "falling":
        scores = -torch.arange(n).float()
    elif kind == "one bin":  # a value and its neighbour, one unit in the last place above
        scores = (torch.ones(n).view(torch.int32) + (scores > 1).int()).view(torch.float32)
    elif kind == "31 finite":
        scores[torch.randperm(n, generator=torch.Generator().manual_seed(1))[31:]] = float("nan")
    wanted = oracle(scores, 32)
    assert select_topk(scores, 32).indices[0].tolist() == wanted + [-1] * (32 - len(wanted))


def test_the_operator_compiles_without_a_graph_break():
    # In a process of its own: the serving tests turn torch.compile off in theirs.
    code = """
import torch
from vllm_wsi.kernels import score_topk
from vllm_wsi.selection.scorer import seeded_scorer
weights, x = seeded_scorer("patch", 64, 32, 1).requires_grad_(False).weights(), torch.randn(200, 64)
compiled = torch.compile(lambda x: score_topk(x * 2, weights, 5).indices, fullgraph=True, backend="eager")
assert torch.equal(compiled(x), score_topk(x * 2, weights, 5).indices)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("hidden", [0, 32, 256])
def test_scores_have_the_same_bits_for_every_cut_of_the_slide(hidden):
    x, weights = features(3 * block_rows(512) + 77, 512), scorer(hidden, 512).weights()
    whole = score_patches(x, weights)
    for size in (1000, 1024, 1500, 2048):
        parts = [score_patches(x[i : i + size], weights, first_row=i) for i in range(0, len(x), size)]
        assert torch.equal(torch.cat(parts).view(torch.int32), whole.view(torch.int32)), size


def test_scores_have_the_same_bits_on_a_hundred_repeats_and_any_number_of_threads():
    x, weights = features(1500, 512), scorer(256, 512).weights()
    first = score_patches(x, weights)
    threads = torch.get_num_threads()
    try:
        for i in range(100):
            torch.set_num_threads(1 + i % 2)
            assert torch.equal(score_patches(x, weights).view(torch.int32), first.view(torch.int32))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_agree_with_float64_arithmetic(dtype):
    x = features(700, 512).to(dtype)
    module = scorer(256, 512)
    exact = module.double()
    y = torch.nn.functional.layer_norm(x.double(), (512,), exact.norm.weight, exact.norm.bias)
    wanted = exact.out(torch.nn.functional.gelu(exact.hidden(y)))[:, 0]
    assert (score_patches(x, module.float().weights()) - wanted).abs().max() < 2e-6


def test_a_strided_view_scores_as_its_copy():
    wide = features(1200, 2 * D)
    weights = scorer().weights()
    assert torch.equal(score_patches(wide[:, :D], weights), score_patches(wide[:, :D].clone(), weights))


def test_the_module_and_the_reference_give_the_same_scores():
    x, module = features(300), scorer()
    assert torch.allclose(module(x[None])[0], score_patches(x, module.weights()), atol=1e-6)


def test_a_slide_of_another_size_is_refused():
    for function in (score_patches, partial(score_topk, k=2)):
        with pytest.raises(ValueError, match="features have size 65, wanted 64"):
            function(features(3, 65), scorer().weights())


def test_an_unknown_scorer_kind_is_refused():
    with pytest.raises(ValueError, match="found 'magic', wanted one of patch, context"):
        build_scorer("magic", D, 8)


def test_a_linear_scorer_has_no_hidden_layer_and_gradients_reach_every_parameter():
    for hidden in (0, 16):
        module = PatchScorer(D, hidden)
        module(features(9)).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        assert (module.hidden is None) == (hidden == 0)
