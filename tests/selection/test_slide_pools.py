"""Summary tokens: means of the patches that a selection drops, exact however the slide is read."""

import numpy as np
import pytest
import torch

from vllm_wsi.errors import SettingsError, SlideError
from vllm_wsi.selection.scorer import frozen_scorer, seeded_scorer
from vllm_wsi.selection.selection import check_summary
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.selection.slide_pools import STEP, SlidePools, normalised
from vllm_wsi.slides import features_in_memory

D, K, S = 48, 12, 4
KINDS = {
    "patch": {},
    "context": {"num_layers": 1, "num_heads": 2},
    "question": {"rank": 4, "free_tokens": 3, "text_size": 8, "num_slide_tokens": K - S},
}


def scorer(kind: str):
    return frozen_scorer(seeded_scorer(kind, D, 16, seed=3, **KINDS[kind]))


def selector(kind: str = "patch", **options) -> SlideSelector:
    return SlideSelector(scorer(kind), K, summary_tokens=S, **options)


def query(kind: str) -> torch.Tensor | None:
    return torch.tensor([1.0, -2.0, 0.5, 1.0]) if kind == "question" else None


def matrix(n: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, D)).astype(dtype)


def means_of(x: np.ndarray, kept: torch.Tensor) -> torch.Tensor:
    """What the means should be, one pool after the other, added as integers."""
    rows = (normalised(torch.from_numpy(x)) / STEP).round().to(torch.int64)
    dropped = [i for i in range(len(x)) if i not in set(kept.tolist()) and np.isfinite(x[i]).all()]
    pools = [[i for i in dropped if i % S == pool] for pool in range(S)]
    means = [rows[pool].sum(dim=0).double() * STEP / len(pool) for pool in pools if pool]
    return torch.stack(means).float() if means else torch.empty(0, D)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, K - S - 1, K - S, K - S + 1, K - 1, K, K + 1, 700])
def test_the_summary_is_the_means_of_the_dropped_patches_and_all_others_are_kept(kind, n):
    x = matrix(n)
    found = selector(kind).select(features_in_memory(x), query=query(kind))
    plain = SlideSelector(scorer(kind), K - S).select(features_in_memory(x), query=query(kind))
    assert torch.equal(found.indices, plain.indices)
    assert torch.equal(found.pooled, means_of(x, found.indices))
    assert found.num_tokens == len(found.rows) <= K
    assert torch.equal(found.rows[: len(found.indices)], found.features)
    assert (found.record()["num_selected"], found.record()["num_summary_tokens"]) == (
        len(plain.indices),
        len(found.pooled),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_chunk_size_changes_a_bit_of_the_summary(kind, dtype):
    x = matrix(2500, dtype)
    whole = selector(kind).select(features_in_memory(x), query=query(kind)).pooled
    for chunk_rows in (1, 7, 1000, 2048):
        cut = selector(kind, chunk_rows=chunk_rows).select(features_in_memory(x), query=query(kind)).pooled
        assert torch.equal(cut, whole)


def test_patches_that_are_not_finite_are_in_no_pool():
    x = matrix(60)
    x[3], x[17, 5], x[40, -1] = np.nan, np.inf, -np.inf
    found = selector().select(features_in_memory(x))
    assert torch.equal(found.pooled, means_of(x, found.indices))
    assert bool(torch.isfinite(found.pooled).all())


def test_a_pool_whose_patches_are_all_kept_gives_no_token():
    pools = SlidePools.empty(S, D)
    x = torch.from_numpy(matrix(9))
    pools.add(torch.arange(9), x)
    gone = torch.tensor([1, 5, 2])
    left = pools.without(gone, x[gone])
    assert left.counts.tolist() == [3, 0, 1, 2]
    assert torch.equal(left.means()[1], (normalised(x[6:7]) / STEP).round()[0] * STEP)
    assert len(left.means()) == 3
    assert not left.sums[1].any()


def test_a_loud_patch_weighs_no_more_than_another():
    x = matrix(50)
    louder = x * np.where(np.arange(50) % 5, 1, 64)[:, None].astype(np.float32)
    one, other = (SlidePools.empty(S, D) for _ in range(2))
    one.add(torch.arange(50), torch.from_numpy(x))
    other.add(torch.arange(50), torch.from_numpy(louder))
    torch.testing.assert_close(one.means(), other.means(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("k", [0, 1, S])
def test_a_k_that_leaves_no_patch_is_refused(k):
    with pytest.raises(SlideError, match=f"k: found {k}, wanted more than {S}, the summary tokens of each slide"):
        selector().select(features_in_memory(matrix(50)), k)
    with pytest.raises(SettingsError, match=f"num_slide_tokens: found {S}, wanted more than {S}"):
        SlideSelector(scorer("patch"), S, summary_tokens=S)


def test_another_k_keeps_other_patches_and_pools_the_rest():
    x = matrix(300)
    for k in (S + 1, 40, 299, 300, 304, 500):
        found = selector().select(features_in_memory(x), k)
        assert len(found.indices) == min(300, k - S)
        assert torch.equal(found.pooled, means_of(x, found.indices))


def test_a_selection_without_the_summary_that_a_checkpoint_shows_is_refused():
    slide = features_in_memory(matrix(300))
    with_summary, without = selector().select(slide), SlideSelector(scorer("patch"), K).select(slide)
    check_summary(with_summary, S)
    check_summary(without, 0)
    with pytest.raises(SlideError, match="pooled: found 4 rows, wanted none: the checkpoint has no summary tokens"):
        check_summary(with_summary, 0)
    with pytest.raises(SlideError, match="pooled: found none, wanted the means of the dropped patches, at most 4"):
        check_summary(without, S)
    with pytest.raises(SlideError, match="pooled: found 4 rows, wanted the means of the dropped patches, at most 3"):
        check_summary(with_summary, 3)
