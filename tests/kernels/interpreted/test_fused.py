"""score_topk_triton: one launch gives bit for bit what the two launches give."""

import pytest
import torch

from vllm_wsi.kernels.buffers import Workspace
from vllm_wsi.kernels.fused import score_topk_triton
from vllm_wsi.kernels.launch_table import FusedConfig, LaunchConfig
from vllm_wsi.kernels.reference import Running, select_topk
from vllm_wsi.kernels.score import score_triton

from .test_score import features, scorer

TILES = {0: LaunchConfig(16, 64, 4, 1), 64: LaunchConfig(32, 64, 4, 2)}


def config(h=64, programs=3):
    return FusedConfig(TILES[h], programs, block=64)


def check(x, weights, k, how, by_score=False, **options):
    """Against the scoring kernel, and the Top-K oracle on its scores: every bit, the absent places included."""
    selected, scores = score_topk_triton(x, weights, k, how, by_score=by_score, **options)
    wanted = score_triton(x, weights, how.tile)
    assert torch.equal(scores.view(torch.int32), wanted.view(torch.int32))
    oracle = select_topk(scores, k, x, options.get("cu_seqlens"), by_score=by_score)
    for one, other in zip(selected, oracle, strict=True):
        assert torch.equal(one, other)
    return selected


@pytest.mark.parametrize("h", [0, 64])
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 65, 200])
def test_awkward_lengths(n, h, dtype, device):
    check(features(n, 256).to(device, dtype), scorer(256, h).weights().to(device), 32, config(h))


@pytest.mark.parametrize("k", [1, 5, 33])
def test_every_k_in_both_orders(k, device):
    x, weights = features(70, 256).to(device), scorer(256, 0).weights().to(device)
    for by_score in (False, True):
        check(x, weights, k, config(0), by_score=by_score)


def test_the_largest_k(device):
    check(features(300, 256).to(device), scorer(256, 0).weights().to(device), 256, config(0))


@pytest.mark.parametrize("h", [0, 64])
def test_ties_go_to_the_lower_row(h, device):
    x = features(7, 256).repeat(20, 1).to(device)
    selected = check(x, scorer(256, h).weights().to(device), 32, config(h))
    assert len(selected.scores.unique()) == 2  # the best row's twenty copies, and twelve of the next


@pytest.mark.parametrize("h", [0, 64])
def test_rows_that_are_not_finite_are_never_kept(h, device):
    x = features(70, 256).to(device)
    x[::2, 3], x[1::4, 9] = float("nan"), float("inf")
    selected = check(x, scorer(256, h).weights().to(device), 32, config(h))
    kept = selected.indices[0]
    assert (kept >= 0).sum() == 17
    assert (kept[:17] % 4 == 3).all()


@pytest.mark.parametrize("programs", [1, 2, 5, 100])
def test_the_number_of_programs_changes_no_bit(programs, device):
    check(features(150, 256).to(device), scorer(256, 0).weights().to(device), 32, config(0, programs))


@pytest.mark.parametrize("programs", [16, 17, 33])
def test_groups_of_programs_change_no_bit(programs, device):
    x, weights = features(16 * programs, 256).to(device), scorer(256, 0).weights().to(device)
    x[::5, 3] = float("nan")
    workspace = Workspace(device)
    check(x, weights, 32, config(0, programs), workspace=workspace)
    assert workspace.tickets.eq(0).all()


def test_groups_of_programs_change_no_bit_of_a_batch(device):
    x, weights = features(320, 256).to(device), scorer(256, 0).weights().to(device)
    cu_seqlens = torch.tensor([0, 0, 300, 320], dtype=torch.int32, device=device)
    check(x, weights, 5, config(0, programs=20), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("lengths", [[0, 5, 40], [40, 0], [1] * 4, [63, 65, 32], [0]], ids=str)
def test_slides_of_a_batch_are_selected_as_each_alone(lengths, device):
    x, weights = features(sum(lengths), 256).to(device), scorer(256, 64).weights().to(device)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    together = check(x, weights, 5, config(), cu_seqlens=cu_seqlens)
    for slide, part in enumerate(x.split(lengths)):
        alone = check(part, weights, 5, config())
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one[slide], other[0])


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("chunk", [1, 50, 64])
def test_a_slide_in_chunks_keeps_what_the_whole_slide_keeps(chunk, by_score, device):
    n = 8 if chunk == 1 else 150
    x, weights = features(n, 256).to(device, torch.float16), scorer(256, 0).weights().to(device)
    x[3:5, 7] = float("nan")
    whole = check(x, weights, 32, config(0), by_score=by_score)
    running = None
    for start in range(0, n, chunk):
        selected, _ = score_topk_triton(
            x[start : start + chunk], weights, 32, config(0), first_row=start, running=running, by_score=by_score
        )
        running = Running(selected.indices, selected.rows, selected.keys)
    for one, other in zip(selected, whole, strict=True):
        assert torch.equal(one, other)


def test_a_used_workspace_changes_no_bit(device):
    workspace, weights = Workspace(device, 3), scorer(256, 0).weights().to(device)
    for n in (10, 150, 70):
        check(features(n, 256).to(device), weights, 32, config(0), workspace=workspace)
        assert workspace.tickets.eq(0).all()


def test_a_strided_matrix_is_gathered_bit_for_bit(device, dtype):
    wide = features(50, 300).to(device, dtype)
    check(wide[:, :256], scorer(256, 64).weights().to(device), 3, config())
    check(wide[1:, 8:264], scorer(256, 0).weights().to(device), 3, config(0))


def test_rows_that_lie_four_gibibytes_apart(device):
    x = torch.empty_strided((2, 256), (2**31, 1), dtype=torch.float16, device=device).copy_(features(2, 256))
    check(x, scorer(256, 64).weights().to(device), 1, config())


def test_what_cannot_be_kept_is_refused(device):
    x, weights = features(3, 256).to(device), scorer(256, 0).weights().to(device)
    with pytest.raises(ValueError, match="k: found 257, wanted at most 256"):
        score_topk_triton(x, weights, 257, config(0))
    with pytest.raises(ValueError, match="does not fit a key"):
        score_topk_triton(x, weights, 2, config(0), first_row=2**31 - 2)
    with pytest.raises(ValueError, match="features have size 320, wanted 256"):
        score_topk_triton(features(3, 320).to(device), weights, 2, config(0))
