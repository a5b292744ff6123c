"""Selection policies: each keeps exactly the patches that its rule names, under the same terms as SlideSelector."""

import sys

import numpy as np
import pytest
import torch

from vllm_wsi.errors import SetupError, SlideError
from vllm_wsi.selection.baselines import POLICIES, make_policy
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import features_in_memory, open_features, write_features

D, K = 16, 8
GEOMETRIC = ["top-norm", "k-means", "farthest-point", "mmr"]
RULES = ["random", "uniform", *GEOMETRIC]


@pytest.fixture(scope="module")
def weights():
    return seeded_scorer("patch", D, 32, seed=2).requires_grad_(False).weights()


def matrix(n: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng((n, seed)).standard_normal((n, D)).astype(dtype)


def policy(name: str, k: int = K, **options):
    if name == "k-means":
        pytest.importorskip("sklearn")
    return make_policy(name, k, **options)


def kept(name: str, x, k: int = K, slide_name: str = "a", **options) -> list[int]:
    x = np.asarray(x)
    x = x.astype(np.float32) if x.dtype.kind == "i" else x
    return policy(name, k, **options).select(features_in_memory(x, slide_name)).indices.tolist()


def test_every_policy_but_the_oracle_is_tested_by_the_common_rules():
    assert {*RULES, "oracle"} == set(POLICIES)


# What all have in common


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n", [1, K - 1, K, K + 1, 100])
def test_min_k_n_distinct_rows_are_kept_in_ascending_order(name, n):
    x = matrix(n)
    selection = policy(name).select(features_in_memory(x))
    rows = selection.indices.tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == len(selection.scores) == min(K, n)
    assert set(rows) <= set(range(n))
    assert selection.indices.dtype == torch.int64
    assert selection.scores.dtype == torch.float32
    assert torch.isfinite(selection.scores).all()
    assert selection.num_patches == n
    assert selection.num_nonfinite == 0


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("k", [1, 3, 99, 100, 101])
def test_k_of_one_call_overrides_the_policys_own(name, k):
    slide = features_in_memory(matrix(100))
    selection = policy(name).select(slide, k)
    assert len(selection.indices) == min(k, 100)
    assert torch.equal(selection.indices, policy(name, k).select(slide).indices)


@pytest.mark.parametrize("name", RULES)
def test_a_k_below_one_is_refused(name):
    with pytest.raises(ValueError, match="k: found 0, wanted at least 1"):
        policy(name).select(features_in_memory(matrix(3)), 0)


@pytest.mark.parametrize("name", GEOMETRIC)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_among_equal_patches_the_lower_rows_are_kept(name, value):
    assert kept(name, np.full((5000, D), value, np.float32)) == list(range(K))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_patches_with_one_bad_feature_are_never_kept_and_counted(name, bad):
    x = matrix(60)
    x[::3, 5] = bad
    selection = policy(name).select(features_in_memory(x))
    assert len(selection.indices) == K
    assert (selection.indices % 3 != 0).all()
    assert selection.num_nonfinite == 20
    assert np.array_equal(selection.features.numpy(), x[selection.indices.numpy()])


@pytest.mark.parametrize("name", GEOMETRIC)
def test_bad_patches_change_nothing_for_the_others(name):
    x = matrix(60)
    holed = np.full((120, D), np.nan, np.float32)
    holed[1::2] = x
    assert kept(name, holed) == [2 * row + 1 for row in kept(name, x)]


@pytest.mark.parametrize("name", RULES)
def test_fewer_finite_patches_than_k_are_all_kept(name):
    x = matrix(100)
    x[3:] = np.nan
    selection = policy(name).select(features_in_memory(x))
    assert selection.indices.tolist() == [0, 1, 2]
    assert selection.num_nonfinite == 97


@pytest.mark.parametrize("name", RULES)
def test_a_slide_without_a_finite_patch_is_refused(name):
    with pytest.raises(
        SlideError, match=r"^a: features: found no patch with finite features among 40, wanted at least"
    ):
        kept(name, np.full((40, D), np.nan, np.float32))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", GEOMETRIC)
def test_features_at_the_end_of_the_float_range_give_k_distinct_patches(name):
    x = matrix(50)
    x[7] = np.finfo(np.float32).max
    assert len(set(kept(name, x))) == K


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_kept_rows_are_the_files_bit_for_bit_and_coordinates_belong_to_them(name, dtype, tmp_path):
    x, coords = matrix(200, dtype), np.stack([np.arange(200) * 512, np.arange(200) * 3], axis=1)
    write_features(tmp_path / "a.safetensors", x, coords, {"encoder": "e@1"})
    with open_features(tmp_path / "a.safetensors") as slide:
        selection = policy(name).select(slide)
    rows = selection.indices.numpy()
    assert selection.features.dtype == getattr(torch, dtype)
    assert selection.features.numpy().tobytes() == x[rows].tobytes()
    record = selection.record()
    assert record["coords"] == [[i * 512, i * 3] for i in record["indices"]]
    assert record["coord_unit"] == "px"
    assert record["metadata"] == {"encoder": "e@1"}


@pytest.mark.parametrize("name", RULES)
def test_bfloat16_rows_survive_as_bfloat16(name):
    x = torch.from_numpy(matrix(300)).bfloat16()
    slide = features_in_memory(x.view(torch.uint16).numpy(), dtype="bfloat16")
    selection = policy(name).select(slide)
    assert torch.equal(selection.features, x[selection.indices])
    if name in GEOMETRIC:
        assert selection.indices.tolist() == kept(name, x.float().numpy())


@pytest.mark.parametrize("name", RULES)
def test_a_second_run_keeps_the_same_patches_with_the_same_scores(name):
    slide = features_in_memory(matrix(3000))
    first, second = (policy(name, seed=3).select(slide) for _ in range(2))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.scores, second.scores)


@pytest.mark.parametrize("name", RULES)
def test_a_slide_of_several_chunks_keeps_what_an_equal_one_of_one_chunk_keeps(name, monkeypatch):
    x = matrix(3000)
    whole = kept(name, x)
    monkeypatch.setattr("vllm_wsi.selection.chunk_reader.CPU_CHUNK_BYTES", 1)
    assert kept(name, x) == whole


# One by one


def test_random_keeps_the_same_rows_for_a_seed_and_others_for_another():
    x = matrix(1000)
    assert kept("random", x, seed=1) == kept("random", x, seed=1) != kept("random", x, seed=2)


def test_random_depends_on_the_slides_name_and_length_and_not_on_its_folder_or_features():
    first = kept("random", matrix(1000), slide_name="/here/a.h5")
    assert kept("random", matrix(1000, seed=1), slide_name="/elsewhere/a.h5") == first
    assert kept("random", matrix(1000), slide_name="b.h5") != first
    assert kept("random", matrix(1001), slide_name="a.h5") != first


def test_random_goes_by_the_slide_id_where_the_file_says_one(tmp_path):
    rows = []
    for file, slide_id in [("a", "s1"), ("b", "s1"), ("c", "s2")]:
        write_features(tmp_path / file, matrix(500), metadata={"slide_id": slide_id})
        with open_features(tmp_path / file) as slide:
            rows.append(policy("random").select(slide).indices.tolist())
    assert rows[0] == rows[1] != rows[2]


def test_random_keeps_these_rows_on_every_machine():
    assert kept("random", matrix(1000), 4, slide_name="a.h5", seed=0) == [399, 519, 772, 926]


def test_random_draws_every_row_equally_often():
    x, counts = matrix(20), np.zeros(20)
    for seed in range(400):
        counts[kept("random", x, 5, seed=seed)] += 1
    assert abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


def test_random_of_a_larger_k_keeps_what_a_smaller_one_keeps():
    x = matrix(1000)
    assert set(kept("random", x, 5)) < set(kept("random", x, 50))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 16, 17, 1000, 100_003])
def test_uniform_keeps_the_middle_of_each_of_k_equal_parts(n):
    rows = [int((i + 0.5) * n / K) for i in range(K)] if n > K else list(range(n))
    assert kept("uniform", np.ones((n, 1), np.float32)) == rows


def test_uniform_spaces_the_finite_rows():
    x = np.full((40, D), np.nan, np.float32)
    x[20:] = 1
    assert kept("uniform", x, 2) == [25, 35]


def test_top_norm_keeps_the_largest_norms_and_scores_by_them():
    x = [[0, 1], [3, 4], [0, -5], [6, 0], [0, 0], [-3, -4]]
    selection = policy("top-norm", 3).select(features_in_memory(np.array(x, np.float32)))
    assert selection.indices.tolist() == [1, 2, 3]
    assert selection.scores.tolist() == [5, 5, 6]


def test_top_norm_is_numpys_on_a_random_slide():
    x = matrix(5000)
    best = np.argsort(-np.linalg.norm(x.astype(float), axis=1))[:K]
    assert kept("top-norm", x) == sorted(best)


def test_k_means_keeps_one_patch_of_each_separated_cluster_and_the_nearest_to_its_centre():
    offsets = np.array([[0, 0], [1, 0], [-1, 0], [0, 2], [0, -2]])
    centres = np.array([[0, 0], [100, 0], [0, 100], [300, 300]])
    x = (centres[:, None] + offsets).reshape(-1, 2)
    for seed in range(5):
        selection = policy("k-means", 4, seed=seed).select(features_in_memory(x.astype(np.float32)))
        assert selection.indices.tolist() == [0, 5, 10, 15]
        assert selection.scores.abs().max() < 0.5  # the next patch lies 1 away from the centre


def test_k_means_leaves_the_number_of_threads_alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # does nothing in a process where vLLM has run on the CPU
    set_to = torch.get_num_threads()
    try:
        kept("k-means", matrix(100))
        assert torch.get_num_threads() == set_to
    finally:
        torch.set_num_threads(threads)


def test_k_means_of_fewer_distinct_patches_than_k_keeps_k_rows():
    x = np.repeat(matrix(3), 10, axis=0)
    rows = kept("k-means", x)
    assert len(set(rows)) == K
    assert {row // 10 for row in rows} == {0, 1, 2}


def test_k_means_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    wanted = r'^sklearn\.cluster: found no such package, wanted it: pip install "vllm-wsi\[study\]"$'
    with pytest.raises(SetupError, match=wanted):
        make_policy("k-means", 2).select(features_in_memory(matrix(9)))


def test_farthest_point_starts_nearest_to_the_mean_and_goes_to_the_farthest():
    x = np.array([[0], [10], [4], [5], [1]], np.float32)  # the mean is 4
    selection = policy("farthest-point", 4).select(features_in_memory(x))
    assert selection.indices.tolist() == [0, 1, 2, 3]  # rows 3 and 4 both lie 1 away from a kept patch
    assert selection.scores.tolist() == [4, 6, 0, 1]
    assert [kept("farthest-point", x, k) for k in (1, 2, 3)] == [[2], [1, 2], [0, 1, 2]]


def test_farthest_point_gives_a_tie_to_the_lower_row():
    x = np.array([[2, 0], [0, 0], [-2, 0], [0, 2], [0, -2]], np.float32)
    assert [kept("farthest-point", x, k) for k in (1, 2, 3, 4)] == [[1], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_farthest_point_is_the_greedy_rule_of_the_whole_distance_matrix():
    x = matrix(300).astype(float)
    distances = np.linalg.norm(x[:, None] - x[None], axis=2)
    rows = [int(np.linalg.norm(x - x.mean(0), axis=1).argmin())]
    while len(rows) < K:
        rows.append(int(distances[rows].min(0).argmax()))
    assert kept("farthest-point", x.astype(np.float32)) == sorted(rows)


def greedy_mmr(x: np.ndarray, relevance: np.ndarray, weight: float) -> list[int]:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = unit @ unit.T
    scaled = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    rows = [int(scaled.argmax())]
    while len(rows) < K:
        value = weight * scaled - (1 - weight) * cosine[rows].max(0)
        value[rows] = -np.inf
        rows.append(int(value.argmax()))
    return sorted(rows)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_mmr_is_the_greedy_rule_of_the_whole_cosine_matrix(weight, weights):
    x = matrix(300)
    scores = SlideSelector(weights, 300).select(features_in_memory(x)).scores.numpy()
    wide, norms = x.astype(float), np.linalg.norm(x.astype(float), axis=1)
    assert kept("mmr", x, relevance_weight=weight) == greedy_mmr(wide, norms, weight)
    assert kept("mmr", x, relevance_weight=weight, scorer=weights) == greedy_mmr(wide, scores.astype(float), weight)


def test_mmr_passes_over_a_copy_for_a_less_relevant_patch_that_differs():
    x = [[10, 0], [10, 0], [9, 0], [0, 6], [0, 1]]
    assert kept("mmr", x, 2) == [0, 3]
    assert kept("mmr", x, 2, relevance_weight=1.0) == [0, 1]


def test_mmr_keeps_one_blank_patch_at_most_while_others_differ():
    x = np.concatenate([np.zeros((20, D)), np.eye(D)]).astype(np.float32)
    assert sum(row < 20 for row in kept("mmr", x)) <= 1


def test_mmr_by_relevance_alone_is_the_learned_selection(weights):
    slide = features_in_memory(matrix(1000))
    learned = SlideSelector(weights, K).select(slide)
    selection = policy("mmr", scorer=weights, relevance_weight=1.0).select(slide)
    assert torch.equal(selection.indices, learned.indices)
    assert torch.equal(selection.scores, learned.scores)


def test_mmr_refuses_a_scorer_of_another_feature_size(weights):
    with pytest.raises(SlideError, match=f"found d = 3, wanted {D}, as the scorer has it"):
        kept("mmr", np.ones((20, 3), np.float32), scorer=weights)


def test_mmr_refuses_a_scorer_that_gives_nan(weights):
    broken = weights._replace(out_bias=torch.tensor(torch.nan))
    with pytest.raises(SlideError, match="found a score that is NaN or infinite"):
        kept("mmr", matrix(20), scorer=broken)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_mmr_refuses_a_weight_outside_0_to_1(weight):
    with pytest.raises(ValueError, match="relevance_weight: found"):
        make_policy("mmr", K, relevance_weight=weight)


def test_the_oracle_keeps_the_given_rows_alone_and_at_most_k():
    x = matrix(100)
    assert kept("oracle", x, rows=[70, 3, 50, 3]) == [3, 50, 70]
    assert kept("oracle", x, 2, rows=np.array([70, 3, 50])) == [3, 70]


def test_the_oracle_passes_over_given_rows_that_are_not_finite():
    x = matrix(100)
    x[3] = np.nan
    selection = policy("oracle", rows=[3, 4]).select(features_in_memory(x))
    assert selection.indices.tolist() == [4]
    assert selection.num_nonfinite == 1
    with pytest.raises(SlideError, match="found no finite patch among the 1 given rows"):
        kept("oracle", x, rows=[3])


@pytest.mark.parametrize("row", [-1, 100])
def test_the_oracle_refuses_a_row_that_the_slide_lacks(row):
    with pytest.raises(SlideError, match=f"found 100 patches, wanted one in row {row}"):
        kept("oracle", matrix(100), rows=[row])


def test_an_unknown_policy_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=f"^policy: found 'best', wanted one of {', '.join(POLICIES)}$"):
        make_policy("best", K)
