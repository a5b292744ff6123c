"""SlideSelector: a file streamed through the scorer keeps exactly what the whole matrix would."""

import numpy as np
import pytest
import torch

from vllm_wsi.errors import SettingsError, SetupError, SlideError
from vllm_wsi.kernels import score_topk
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import features_in_memory, open_features, write_features

D = 96


@pytest.fixture(scope="module")
def weights():
    return seeded_scorer("patch", D, 64, seed=2).requires_grad_(False).weights()


def matrix(n: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n, D)).astype(dtype)


@pytest.mark.parametrize(
    ("n", "chunk_rows"), [(n, size) for n in (1, 31, 32, 33) for size in (1, 7, 1024)] + [(2500, 1000), (2500, 2048)]
)
def test_every_chunk_size_keeps_what_the_whole_matrix_keeps(weights, n, chunk_rows):
    x = matrix(n)
    selection = SlideSelector(weights, 32, chunk_rows=chunk_rows).select(features_in_memory(x))
    whole = score_topk(torch.from_numpy(x), weights, 32)
    kept = whole.indices[0][:n]
    assert torch.equal(selection.indices, kept)
    assert torch.equal(selection.scores, whole.scores[0][:n])
    assert np.array_equal(selection.features.numpy(), x[kept.numpy()])
    assert selection.num_patches == n


def test_k_of_one_call_overrides_the_selectors_own(weights):
    selector, x = SlideSelector(weights, 32), matrix(500)
    for k in (1, 33, 500, 501):
        assert len(selector.select(features_in_memory(x), k).indices) == min(k, 500)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_kept_rows_are_in_the_files_dtype_bit_for_bit(weights, tmp_path, dtype):
    x = matrix(1500, dtype)
    write_features(tmp_path / "a.safetensors", x)
    with open_features(tmp_path / "a.safetensors") as slide:
        selection = SlideSelector(weights, 32).select(slide)
    assert selection.features.dtype == getattr(torch, dtype)
    assert np.array_equal(selection.features.numpy(), x[selection.indices.numpy()])


def test_bfloat16_rows_survive_as_bfloat16(weights):
    x = torch.from_numpy(matrix(300)).bfloat16()
    slide = features_in_memory(x.view(torch.uint16).numpy(), dtype="bfloat16")
    selection = SlideSelector(weights, 32).select(slide)
    assert torch.equal(selection.features, x[selection.indices])
    assert torch.equal(selection.indices, score_topk(x, weights, 32).indices[0])


def test_coordinates_of_kept_patches_belong_to_their_rows(weights, tmp_path):
    coords = np.stack([np.arange(200) * 512, np.arange(200) * 3], axis=1)
    write_features(tmp_path / "a.safetensors", matrix(200), coords, {"encoder": "e@1"})
    with open_features(tmp_path / "a.safetensors") as slide:
        record = SlideSelector(weights, 5).select(slide).record()
    assert record["coords"] == [[i * 512, i * 3] for i in record["indices"]]
    assert record["coord_unit"] == "px"
    assert record["metadata"] == {"encoder": "e@1"}


def test_fewer_finite_rows_than_k_keep_them_all_and_count_the_rest(weights):
    x = matrix(100)
    x[7:] = np.nan
    selection = SlideSelector(weights, 32, chunk_rows=10).select(features_in_memory(x))
    assert selection.indices.tolist() == list(range(7))
    assert np.array_equal(selection.features.numpy(), x[:7])
    assert selection.num_nonfinite == 93


def test_a_slide_without_a_finite_row_is_refused(weights):
    with pytest.raises(SlideError, match="found no patch with a finite score among 40"):
        SlideSelector(weights, 32).select(features_in_memory(np.full((40, D), np.nan, np.float32)))


def test_another_feature_size_is_refused_with_both_sizes(weights):
    with pytest.raises(SlideError, match=f"found d = 32, wanted {D}"):
        SlideSelector(weights, 32).select(features_in_memory(np.ones((3, 32), np.float32)))


def test_a_slide_longer_than_max_patches_is_refused(weights):
    with pytest.raises(SlideError, match="found 11 patches, wanted at most 10"):
        SlideSelector(weights, 32, max_patches=10).select(features_in_memory(matrix(11)))


def test_an_unknown_device_is_refused(weights):
    with pytest.raises(SettingsError, match="found 'tpu', wanted 'cpu', 'cuda', 'cuda:N' or 'auto'"):
        SlideSelector(weights, 32, "tpu")


def test_cuda_is_refused_at_once_where_there_is_none_and_auto_takes_the_cpu(weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SetupError, match="found 'cuda', wanted 'cpu' or 'auto': PyTorch finds no CUDA device here"):
        SlideSelector(weights, 32, "cuda")
    assert len(SlideSelector(weights, 3, "auto").select(features_in_memory(matrix(9))).indices) == 3
    assert not torch.cuda.is_initialized()


def test_the_real_slide_keeps_the_same_patches_at_every_chunk_size(shared_data):
    weights = seeded_scorer("patch", 512, 256, seed=0).requires_grad_(False).weights()
    kept = []
    for chunk_rows in (64, 777, 2048):
        with open_features(shared_data / "features/mopadi_TCGA-AD-6964/features.h5") as slide:
            kept.append(SlideSelector(weights, 32, chunk_rows=chunk_rows).select(slide))
    assert all(torch.equal(kept[0].indices, other.indices) for other in kept[1:])
    assert all(torch.equal(kept[0].scores, other.scores) for other in kept[1:])
    assert len(kept[0].indices) == 32


@pytest.mark.parametrize("chunk_rows", [7, 1024])
def test_all_scores_and_places_are_kept_where_they_are_asked_for(weights, tmp_path, chunk_rows):
    x, coords = matrix(40), np.stack([np.arange(40) * 256, np.zeros(40)], axis=1)
    x[3, 5] = np.nan
    write_features(tmp_path / "a.safetensors", x, coords)
    selector = SlideSelector(weights, 32, chunk_rows=chunk_rows)
    with open_features(tmp_path / "a.safetensors") as slide:
        plain, full = selector.select(slide), selector.select(slide, keep_all_scores=True)
    assert plain.all_scores is None
    assert torch.equal(full.all_scores[full.indices], plain.scores)
    assert torch.isnan(full.all_scores).nonzero().tolist() == [[3]]
    assert np.array_equal(full.all_coords, coords)
    assert full.all_rects("a").tolist() == [[i * 256, 0, 256, 256] for i in range(40)]
    assert np.array_equal(full.rects("a"), full.all_rects("a")[full.indices.numpy()])
    assert full.record()["patch_size"] == {"value": 256.0, "unit": "px", "source": "guess"}
