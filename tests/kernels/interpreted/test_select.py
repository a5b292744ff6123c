"""select_triton: exactly the best k of the scores, whatever the scores and however the work is cut."""

import pytest
import torch
import triton
import triton.language as tl

from vllm_wsi.kernels import select as select_module
from vllm_wsi.kernels.best import pack
from vllm_wsi.kernels.buffers import Workspace
from vllm_wsi.kernels.keys import ABSENT, pack_keys, unpack_keys
from vllm_wsi.kernels.launch_table import SELECT_BLOCK
from vllm_wsi.kernels.reference import padded_k, select_topk

from .conftest import INTERPRETED

# The interpreter sorts slowly: there a program takes 64 scores at once, which cuts the same work into as many pieces.
BLOCK = 64 if INTERPRETED else SELECT_BLOCK
SIZES = [0, 1, 31, 32, 33, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK]


def select_triton(*args, **kwargs):
    return select_module.select_triton(*args, block=BLOCK, **kwargs)


def noise(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def nearly_equal(n):
    """All within a few units in the last place of one value: one bin for any filter by leading bits."""
    return (torch.full((n,), 1.0).view(torch.int32) + torch.arange(n).remainder(7).int()).view(torch.float32)


def one_bin(n):
    """One value and its neighbour, one unit in the last place above."""
    return (torch.full((n,), 1.0).view(torch.int32) + (noise(n) > 1).int()).view(torch.float32)


def finite_but_one(n):
    """31 finite scores, one fewer than the test's k; the rest is NaN."""
    scores = torch.full((n,), float("nan"))
    places = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:31]
    scores[places] = noise(len(places))
    return scores


def mostly_nan(n):
    scores = torch.full((n,), float("nan"))
    scores[::97] = noise(len(scores[::97]))
    return scores


def infinite(n):
    scores = noise(n)
    scores[::3], scores[1::3] = float("inf"), float("-inf")
    return scores


KINDS = {
    "random": noise,
    "all equal": lambda n: torch.full((n,), -2.5),
    "two values": lambda n: noise(n).sign(),
    "zeros of both signs": lambda n: torch.zeros(n) * noise(n).sign(),
    "rising": lambda n: torch.arange(n).float(),
    "falling": lambda n: -torch.arange(n).float(),
    "denormal": lambda n: noise(n) * 1e-42,
    "nearly equal": nearly_equal,
    "one bin": one_bin,
    "31 finite": finite_but_one,
    "all NaN": lambda n: torch.full((n,), float("nan")),
    "mostly NaN": mostly_nan,
    "infinite": infinite,
}


def oracle(scores, k):
    """Rows by falling score, ties by rising row, from a stable sort."""
    finite = torch.nonzero(torch.isfinite(scores))[:, 0]
    order = torch.argsort(scores[finite] + 0.0, descending=True, stable=True)
    return finite[order][:k]


def check(selected, scores, k, slide=0, by_score=False):
    wanted = oracle(scores, k)
    wanted = wanted if by_score else wanted.sort().values
    m = len(wanted)
    indices, values = selected.indices[slide].cpu(), selected.scores[slide].cpu()
    assert indices[:m].tolist() == wanted.tolist()
    assert torch.equal(values[:m].view(torch.int32), (scores[wanted] + 0.0).view(torch.int32))
    assert indices[m:].tolist() == [-1] * (k - m)
    assert values[m:].tolist() == [float("-inf")] * (k - m)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_indices_equal_a_stable_sort(kind, n, device):
    scores = KINDS[kind](n)
    check(select_triton(scores.to(device), 32), scores, 32)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter sorts slowly; the reference has the same test")
@pytest.mark.parametrize("kind", ["random", "falling", "rising", "one bin", "31 finite"])
@pytest.mark.parametrize("n", [65_536, 100_000, 1_000_000])
def test_indices_equal_a_stable_sort_in_large_slides(kind, n, device):
    scores = KINDS[kind](n)
    check(select_triton(scores.to(device), 32), scores, 32)


@triton.jit
def _pack_kernel(scores_ptr, keys_ptr, n, first_row, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + at, mask=at < n, other=0.0)
    tl.store(keys_ptr + at, pack(score, first_row + at), mask=at < n)


@pytest.mark.parametrize("first_row", [0, 123_456, 2**31 - 1 - 1000])
def test_the_kernels_keys_are_the_references_for_every_class_of_float(first_row, device):
    bits = [0, 1, 2, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    scores = torch.tensor(bits, dtype=torch.int32)
    scores = torch.cat((scores, scores | -(2**31))).view(torch.float32)
    scores = torch.cat((scores, noise(500), noise(400) * 1e-42))
    keys = torch.empty(len(scores), dtype=torch.int64, device=device)
    _pack_kernel[(1,)](scores.to(device), keys, len(scores), first_row, BLOCK=1024)
    assert torch.equal(keys.cpu(), pack_keys(scores, first_row))


@pytest.mark.parametrize("k", [1, 31, 33, 256])
@pytest.mark.parametrize("n", [1, 5 * BLOCK])
def test_every_k_in_both_orders(k, n, device):
    scores = noise(n).round(decimals=1)
    for by_score in (False, True):
        check(select_triton(scores.to(device), k, by_score=by_score), scores, k, by_score=by_score)


@pytest.mark.parametrize("kind", ["random", "two values", "mostly NaN"])
def test_the_number_of_programs_changes_no_bit(kind, device):
    scores = KINDS[kind](7 * BLOCK - 3).to(device)
    first = select_triton(scores, 32, num_parts=1)
    for parts in (2, 7, 40):
        other = select_triton(scores, 32, num_parts=parts)
        assert torch.equal(other.indices, first.indices), parts
        assert torch.equal(other.scores, first.scores), parts


def test_a_used_workspace_and_repeats_change_no_bit(device):
    workspace = Workspace(device, 3)
    wanted = select_triton(noise(3 * BLOCK).to(device), 32)
    for i in range(9 if INTERPRETED else 100):
        n = [10, 3 * BLOCK, 2 * BLOCK + 5][i % 3]
        check(select_triton(noise(n, i).to(device), 32, workspace=workspace), noise(n, i), 32)
        assert workspace.tickets.eq(0).all()
    again = select_triton(noise(3 * BLOCK).to(device), 32, workspace=workspace)
    assert torch.equal(again.indices, wanted.indices)


@pytest.mark.parametrize(
    "lengths",
    [[0, 5, 40], [5, 0, 0, 40], [40, 0], [1] * 5, [BLOCK - 1, BLOCK + 1, BLOCK], [3 * BLOCK, 31, 32, 33], [0]],
    ids=lambda x: "-".join(map(str, x)),
)
def test_slides_of_a_batch_are_selected_as_each_alone(lengths, device):
    scores = noise(sum(lengths)).round(decimals=1)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    selected = select_triton(scores.to(device), 32, cu_seqlens=cu_seqlens.to(device))
    for slide, part in enumerate(scores.split(lengths)):
        check(selected, part, 32, slide)


def test_many_slides_at_once(device):
    lengths = [(i * 37) % 90 for i in range(8 if INTERPRETED else 64)]
    scores = noise(sum(lengths))
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    selected = select_triton(scores.to(device), 5, cu_seqlens=cu_seqlens.to(device), by_score=True)
    for slide, part in enumerate(scores.split(lengths)):
        check(selected, part, 5, slide, by_score=True)


@pytest.mark.parametrize("by_score", [False, True])
@pytest.mark.parametrize("chunk", [1, 50, 64, 1000])
def test_a_slide_in_chunks_keeps_what_the_whole_slide_keeps(chunk, by_score, device):
    n = 8 if chunk == 1 else 200
    scores = noise(n).round(decimals=1)
    scores[3:5] = float("nan")
    features = noise(n * 96, 1).reshape(n, 96).to(device)
    whole = select_triton(scores.to(device), 31, features, by_score=by_score)
    running = None
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        running = select_triton(
            scores[part].to(device), 31, features[part], first_row=start, running=running, by_score=by_score
        )
    for one, other in zip(running, whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("k", [3, 64])
def test_kept_rows_of_any_size_and_any_strides(k, device):
    scores = noise(40).to(device)
    for x in (noise(40 * 4100).reshape(40, 4100), noise(40 * 70).reshape(70, 40).T, noise(40)[:, None].expand(40, 5)):
        x = x.to(device)
        selected = select_triton(scores, k, x)
        m = min(k, 40)
        assert torch.equal(selected.rows[0, :m], x[selected.indices[0, :m]])
        assert not selected.rows[0, m:].any()


def test_rows_that_lie_four_gibibytes_apart_are_gathered(device):
    x = torch.empty_strided((2, 96), (2**31, 1), dtype=torch.float16, device=device).copy_(noise(192).reshape(2, 96))
    selected = select_triton(torch.tensor([1.0, 3.0]).to(device), 1, x)
    assert torch.equal(selected.rows[0], x[1:].clone(memory_format=torch.contiguous_format))


def test_scores_of_any_stride(device):
    wide = noise(300).reshape(100, 3).to(device)
    check(select_triton(wide[:, 1], 32), wide[:, 1].cpu(), 32)


@pytest.mark.parametrize("d", [64, 100, 1536])
def test_kept_rows_are_gathered_bit_for_bit_from_a_strided_matrix(d, dtype, device):
    wide = noise(100 * (d + 8)).reshape(100, d + 8).to(device, dtype)
    scores = noise(100)
    for k in (3, 32):
        selected = select_triton(scores.to(device), k, wide[:, :d])
        assert torch.equal(selected.rows[0], wide[:, :d][selected.indices[0]])


def test_places_without_a_patch_hold_rows_of_zeros(device):
    selected = select_triton(torch.tensor([1.0, float("nan")]).to(device), 4, torch.ones(2, 64).to(device))
    assert selected.rows[0].sum(dim=1).tolist() == [64, 0, 0, 0]


@pytest.mark.parametrize("by_score", [False, True])
def test_every_output_equals_the_oracles(by_score, device):
    scores, features = KINDS["infinite"](4 * BLOCK).to(device), noise(4 * BLOCK * 64).reshape(-1, 64).to(device)
    cu_seqlens = torch.tensor([0, 5, 5, 3 * BLOCK, 4 * BLOCK]).to(device)
    wanted = select_topk(scores, 31, features, cu_seqlens, by_score=by_score)
    found = select_triton(scores, 31, features, cu_seqlens, by_score=by_score)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_keys_without_a_patch_are_absent(device):
    keys = select_triton(noise(3).to(device), 5).keys[0].cpu()
    assert keys[3:].tolist() == [ABSENT] * (padded_k(5) - 3)
    assert sorted(unpack_keys(keys[:3])[0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("k", [0, 257])
def test_a_k_out_of_range_is_refused(k, device):
    with pytest.raises(ValueError, match=f"k: found {k}, wanted at "):
        select_triton(noise(3).to(device), k)


def test_a_row_that_fits_no_key_is_refused(device):
    with pytest.raises(ValueError, match="does not fit a key"):
        select_triton(noise(3).to(device), 2, first_row=2**31 - 2)
