"""The scorer that hears the question: what it is at its limits, and which patches it keeps."""

import numpy as np
import pytest
import torch

from vllm_wsi.errors import CheckpointError, SlideError
from vllm_wsi.selection.question_scorer import QuestionScorer, vector_scores
from vllm_wsi.selection.question_selection import best_by_question
from vllm_wsi.selection.scorer import build_scorer, frozen_scorer, score_slides, scorer_digest, seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import features_in_memory

D, TEXT, K, FREE = 24, 20, 8, 2


def scorer(rank=4, free_tokens=FREE, hidden_size=16, seed=0):
    options = {"rank": rank, "free_tokens": free_tokens, "text_size": TEXT, "num_slide_tokens": K}
    return seeded_scorer("question", D, hidden_size, seed, **options)


def features(n, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((n, D)).astype(dtype)


def query_of(made, seed=1):
    tokens = torch.randn(5, TEXT, generator=torch.Generator().manual_seed(seed))
    return made.query(tokens, torch.ones(5, dtype=torch.bool)).detach()


@pytest.mark.parametrize("hidden_size", [0, 16])
def test_with_rank_one_and_a_constant_query_it_is_the_patch_scorer_bit_for_bit(hidden_size):
    single, patch = scorer(rank=1, free_tokens=0, hidden_size=hidden_size), seeded_scorer("patch", D, hidden_size, 0)
    for name in ("norm", "hidden", "out"):
        if getattr(patch, name) is not None:
            getattr(single, name).load_state_dict(getattr(patch, name).state_dict())
    x = torch.from_numpy(features(500))
    with torch.no_grad():
        assert torch.equal(single(x, query=torch.ones(1)), patch(x))
    slide = features_in_memory(features(5000))
    wanted = SlideSelector(frozen_scorer(patch), K).select(slide, keep_all_scores=True)
    found = SlideSelector(frozen_scorer(single), K).select(slide, keep_all_scores=True, query=torch.ones(1))
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.all_scores, wanted.all_scores)
    assert torch.equal(found.features, wanted.features)


def oracle(made, x, k, query):
    """By plain sorting: the best by the query, then the best of the others by the one that asks nothing."""
    with torch.no_grad():
        vectors = made.vectors(torch.from_numpy(x)).to(made.vector_dtype).float()
    by_query, free = (vectors * query).sum(-1), (vectors * made.free_query.detach()).sum(-1)
    ranked = sorted(range(len(x)), key=lambda i: (-by_query[i].item(), i))
    ranked = [i for i in ranked if torch.isfinite(by_query[i])]
    num_free = made.free_of(k)
    kept = ranked[: k - num_free]
    others = sorted((i for i in ranked if i not in kept), key=lambda i: (-free[i].item(), i))
    return sorted(kept + others[:num_free])


@pytest.mark.parametrize("k", [1, K - 1, K, K + 1, 64])
@pytest.mark.parametrize("n", [1, K - 1, K, K + 1, 700])
@pytest.mark.parametrize("free_tokens", [0, FREE, K])
def test_the_kept_patches_are_the_best_by_the_question_and_then_the_free_ones(free_tokens, n, k):
    made = scorer(free_tokens=free_tokens)
    query, x = query_of(made), features(n)
    found = SlideSelector(frozen_scorer(made), K).select(features_in_memory(x), k, query=query)
    assert found.indices.tolist() == oracle(made, x, k, query)
    assert len(found.indices) == min(k, n)


def test_ties_go_to_the_lower_row_and_patches_without_a_number_are_never_kept():
    made = scorer()
    x = np.repeat(features(3), 10, axis=0)
    x[4], x[17] = np.nan, np.inf
    query = query_of(made)
    found = SlideSelector(frozen_scorer(made), K).select(features_in_memory(x), 30, query=query)
    assert found.indices.tolist() == oracle(made, x, 30, query)
    assert found.num_nonfinite == 2
    with pytest.raises(SlideError, match="no patch with a finite score"):
        SlideSelector(frozen_scorer(made), K).select(features_in_memory(x[4:5]), query=query)


def test_other_questions_keep_other_patches_and_no_question_keeps_those_of_the_free_query():
    made, slide = scorer(), features_in_memory(features(2000))
    selector = SlideSelector(frozen_scorer(made), K)
    one, other = (selector.select(slide, query=query_of(made, seed)).indices.tolist() for seed in (1, 2))
    assert set(one) != set(other)
    free = selector.select(slide, keep_all_scores=True)
    with torch.no_grad():
        wanted = vector_scores(made.vectors(torch.from_numpy(features(2000))).half(), made.free_query)
    assert torch.allclose(free.all_scores, wanted, atol=1e-6)
    assert free.indices.tolist() == sorted(wanted.topk(K).indices.tolist())


@pytest.mark.parametrize("chunk_rows", [1, 7, 256, 999])
def test_the_bits_do_not_depend_on_how_the_slide_is_cut(chunk_rows):
    made, slide = scorer(), features_in_memory(features(1000))
    query = query_of(made)
    wanted = SlideSelector(frozen_scorer(made), K).select(slide, keep_all_scores=True, query=query)
    found = SlideSelector(frozen_scorer(made), K, chunk_rows=chunk_rows).select(slide, None, True, query)
    assert torch.equal(found.all_scores, wanted.all_scores)
    assert torch.equal(found.indices, wanted.indices)


def test_padding_of_a_question_changes_nothing_and_an_empty_one_has_a_finite_query_and_gradient():
    made = scorer()
    tokens = torch.randn(3, 9, TEXT)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 4:] = True
    mask[1] = True
    queries = made.query(tokens, mask)
    assert torch.allclose(queries[0], made.query(tokens[0, 4:], torch.ones(5, dtype=torch.bool)), atol=1e-6)
    assert not torch.allclose(queries[0], queries[1])
    queries.sum().backward()
    assert torch.isfinite(queries).all()
    assert all(torch.isfinite(one.grad).all() for one in made.parameters() if one.grad is not None)


def test_training_scores_as_selection_does_and_leaves_out_the_same_patches():
    made = scorer()
    x = torch.from_numpy(np.stack([features(40, 1), features(40, 2)]))
    x[0, 3] = torch.nan
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 30:] = False
    query = torch.stack([query_of(made, seed) for seed in (1, 2)])
    found = score_slides(made, x, mask, query)
    assert not found.mask[0, 3]
    assert found.mask.sum() == 39 + 30
    for i in range(2):
        wanted = made(x[i], query=query[i])
        assert torch.allclose(found.scores[i][found.mask[i]], wanted[found.mask[i]], atol=1e-6)
        assert torch.allclose(found.free[i][found.mask[i]], made(x[i])[found.mask[i]], atol=1e-6)
    found.scores[found.mask].sum().backward()
    assert all(torch.isfinite(one.grad).all() for one in made.parameters() if one.grad is not None)


@pytest.mark.parametrize(("k", "wanted"), [(1, 0), (2, 0), (4, 1), (8, 2), (12, 3), (64, 16)])
def test_the_free_patches_keep_their_share_of_another_k(k, wanted):
    assert scorer().free_of(k) == wanted


def test_what_no_scorer_can_have_is_refused():
    for options in ({"rank": 0}, {"free_tokens": -1}, {"free_tokens": K + 1}):
        with pytest.raises(CheckpointError, match="scorer: found rank"):
            QuestionScorer(D, 8, TEXT, num_slide_tokens=K, **options)
    with pytest.raises(CheckpointError, match="found num_heads beside kind 'question'"):
        build_scorer("question", D, 8, num_heads=2)


def test_another_scorer_has_another_digest():
    assert scorer_digest(frozen_scorer(scorer(seed=0))) == scorer_digest(frozen_scorer(scorer(seed=0)))
    assert scorer_digest(frozen_scorer(scorer(seed=0))) != scorer_digest(frozen_scorer(scorer(seed=1)))
    assert scorer_digest(frozen_scorer(scorer(free_tokens=0))) != scorer_digest(frozen_scorer(scorer(free_tokens=2)))
    heads = [seeded_scorer("context", D, 32, 0, num_layers=1, num_heads=n) for n in (2, 4)]
    assert len({scorer_digest(frozen_scorer(one)) for one in heads}) == 2
    changed = scorer(seed=0)
    with torch.no_grad():
        changed.free_query += 1
    assert scorer_digest(frozen_scorer(scorer(seed=0))) != scorer_digest(frozen_scorer(changed))


def test_no_patch_is_chosen_twice_where_both_queries_want_the_same():
    made = scorer()
    vectors = torch.randn(50, 4).half()
    rows, *_ = best_by_question(made, vectors, K, made.free_query.detach().clone())
    assert len(set(rows.tolist())) == K
