"""What only a GPU can show: graphs, streams, the operator on a device. Skipped where there is none."""

import pytest
import torch

from vllm_wsi.kernels import score_topk
from vllm_wsi.kernels.buffers import stream_workspace
from vllm_wsi.kernels.self_check import check_vectors
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import features_in_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
D, K = 512, 32


def weights():
    return seeded_scorer("patch", D, 128, seed=0).requires_grad_(False).weights()


def features(n, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).half()


def test_a_cuda_graph_replays_on_new_features():
    scorer, x = weights().to("cuda"), features(20_000).cuda()
    score_topk(x, scorer, K)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = score_topk(x, scorer, K)
    score_topk(features(300_000).cuda(), scorer, K)  # takes the stream's workspace meanwhile
    for seed in range(1, 4):
        x.copy_(features(20_000, seed))
        graph.replay()
        torch.cuda.synchronize()
        fresh = score_topk(x, scorer, K)
        assert all(torch.equal(one, other) for one, other in zip(captured, fresh, strict=True))


@pytest.mark.parametrize("h", [64, 256])
def test_vectors_of_a_scorer_that_hears_the_question_are_right_on_this_card(h):
    scorer = seeded_scorer("question", D, h, seed=0, rank=16, free_tokens=8, text_size=8).requires_grad_(False)
    check_vectors(scorer.vector_weights(), torch.device("cuda"))
    slide = features_in_memory(features(10_000).numpy())
    query = torch.randn(16, generator=torch.Generator().manual_seed(1))
    one, other = (SlideSelector(scorer, K, "cuda", chunk_rows=rows).select(slide, query=query) for rows in (3000, None))
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.scores, other.scores)


def test_a_hundred_repeats_beside_a_kernel_on_another_stream_give_the_same_bits():
    """Nothing waits in between: the other stream's products take SMs away at any moment of ours."""
    scorer, x = weights().to("cuda"), features(100_000).cuda()
    wanted = score_topk(x, scorer, K)
    noise = torch.randn(2048, 2048, device="cuda")
    product = torch.empty_like(noise)
    torch.cuda.synchronize()
    beside, ours = torch.cuda.Stream(), [torch.cuda.Stream(), torch.cuda.Stream()]
    found = []
    for turn in range(100):
        with torch.cuda.stream(beside):
            for _ in range(10):
                torch.mm(noise, noise, out=product)
        with torch.cuda.stream(ours[turn % 2]):
            found.append(score_topk(x, scorer, K))
    assert not beside.query()  # else the other stream was done before ours, and nothing ran side by side
    torch.cuda.synchronize()
    for one in found:
        assert all(torch.equal(a, b) for a, b in zip(one, wanted, strict=True))


def test_each_stream_keeps_one_workspace():
    device = torch.device("cuda", 0)
    one = stream_workspace(device, 1)
    assert stream_workspace(device, 1) is one
    with torch.cuda.stream(torch.cuda.Stream()):
        assert stream_workspace(device, 1) is not one
    assert len(stream_workspace(device, 5).tickets) == 5


def test_a_streamed_slide_keeps_what_the_whole_one_does_on_the_gpu():
    x = features(10_000)
    whole = score_topk(x.cuda(), weights().to("cuda"), K)
    selection = SlideSelector(weights(), K, "cuda", chunk_rows=3000).select(features_in_memory(x.numpy()))
    assert torch.equal(selection.indices, whole.indices[0].cpu())
    assert torch.equal(selection.scores, whole.scores[0].cpu())


def test_slides_one_after_another_take_no_more_memory_than_one():
    selector, x = SlideSelector(weights(), K, "cuda", chunk_rows=3000), features_in_memory(features(10_000).numpy())
    selector.select(x)
    before = torch.cuda.memory_reserved()
    for _ in range(5):
        selector.select(x)
    assert torch.cuda.memory_reserved() == before


def test_unsupported_sizes_fall_back_and_agree_with_the_cpu():
    scorer = seeded_scorer("patch", 96, 16, seed=0).requires_grad_(False).weights()
    x = torch.randn(3000, 96, generator=torch.Generator().manual_seed(0))
    for k in (32, 300):
        found, wanted = score_topk(x.cuda(), scorer.to("cuda"), k), score_topk(x, scorer, k)
        assert torch.allclose(found.all_scores.cpu(), wanted.all_scores, atol=1e-5)
        assert (found.indices.cpu() == wanted.indices).float().mean() > 0.98
