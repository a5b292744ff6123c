import logging

import numpy as np
import pytest

from vllm_wsi.encoding.encoders import load_encoder
from vllm_wsi.errors import SlideError
from vllm_wsi.tissue.patch_views import flipped, stained, view_of
from vllm_wsi.tissue.tissue_patches import IDC_PATCHES, read_patches
from vllm_wsi.tissue.view_features import view_features

from .tissue_archives import write_archive

IMAGES = np.random.default_rng(0).integers(1, 256, (3, 6, 6, 3)).astype(np.uint8)


def test_the_eight_elements_are_eight_different_symmetries_of_a_square():
    found = {flipped(IMAGES, element).tobytes() for element in range(8)}
    assert len(found) == 8
    assert np.array_equal(flipped(IMAGES, 0), IMAGES)
    assert np.array_equal(flipped(IMAGES, 8), IMAGES)
    for element in range(8):
        assert np.array_equal(np.sort(flipped(IMAGES, element), axis=None), np.sort(IMAGES, axis=None))


def test_stains_that_are_not_changed_give_the_same_picture_and_less_stain_a_lighter_one():
    one, zero = np.ones((3, 3)), np.zeros((3, 3))
    assert np.array_equal(stained(IMAGES, one, zero), IMAGES)
    assert stained(IMAGES, 0.5 * one, zero).mean() > IMAGES.mean() + 20
    assert np.array_equal(stained(IMAGES, zero, zero), np.full_like(IMAGES, 255))


def test_stains_are_those_of_scikit_images_colour_deconvolution():
    color = pytest.importorskip("skimage.color")
    purple = np.full((1, 2, 2, 3), (120, 60, 150), np.uint8)
    amounts = color.rgb2hed(purple)
    assert (amounts > 0).all()  # scikit-image clips what is below
    factor = np.array([[1.2, 0.9, 1.1]])
    wanted = np.rint(255 * color.hed2rgb(amounts * factor[0]))
    assert np.abs(stained(purple, factor, np.zeros((1, 3))) - wanted).max() <= 1


def test_a_patchs_view_depends_on_the_patch_the_view_and_the_seed_alone():
    whole = view_of(IMAGES, 3)
    assert np.array_equal(view_of(IMAGES[2:], 3, first=2), whole[2:])
    assert not np.array_equal(view_of(IMAGES, 3, seed=1), whole)
    assert not np.array_equal(view_of(IMAGES, 11), whole)  # the same flip, another stain
    assert np.array_equal(view_of(IMAGES, 0, seed=5), IMAGES)


def test_features_are_encoded_once_and_equal_those_of_the_encoder(tmp_path, caplog):
    write_archive(tmp_path / IDC_PATCHES, [2, 0], others=60)
    patches, encoder = read_patches(tmp_path), load_encoder("colour-texture")
    with caplog.at_level(logging.INFO, "vllm_wsi.tissue.view_features"):
        first = view_features(patches, encoder, 2, tmp_path / "cache")
    assert len(caplog.messages) == 2
    for view in (0, 1):
        wanted = encoder.encode(np.ascontiguousarray(view_of(patches.images, view))).astype(np.float16)
        assert np.array_equal(first[view], wanted)
    caplog.clear()
    with caplog.at_level(logging.INFO, "vllm_wsi.tissue.view_features"):
        again = view_features(patches, encoder, 3, tmp_path / "cache")
    assert len(caplog.messages) == 1
    assert np.array_equal(again[1], first[1])
    files = sorted(path.name for path in (tmp_path / "cache").rglob("*.npy"))
    assert files == ["view00.npy", "view01-views1-seed0.npy", "view02-views1-seed0.npy"]


def test_features_of_another_archive_or_seed_are_not_taken_for_these(tmp_path):
    encoder, cache = load_encoder("colour-texture"), tmp_path / "cache"
    write_archive(tmp_path / IDC_PATCHES, [2, 0])
    first = view_features(read_patches(tmp_path), encoder, 2, cache)
    other_seed = view_features(read_patches(tmp_path), encoder, 2, cache, seed=1)
    assert np.array_equal(first[0], other_seed[0])
    assert not np.array_equal(first[1], other_seed[1])
    write_archive(tmp_path / IDC_PATCHES, [0, 2])
    other = view_features(read_patches(tmp_path), encoder, 1, cache)
    assert other[0].shape == first[0].shape
    assert not np.array_equal(other[0], first[0])


def test_a_file_in_the_cache_that_does_not_fit_is_told(tmp_path):
    encoder, cache = load_encoder("colour-texture"), tmp_path / "cache"
    write_archive(tmp_path / IDC_PATCHES, [2, 0])
    view_features(read_patches(tmp_path), encoder, 1, cache)
    (path,) = cache.rglob("*.npy")
    np.save(path, np.zeros((3, 3), np.float16))
    with pytest.raises(SlideError, match=r"view00\.npy: found float16 of shape \(3, 3\), wanted float16 \(14, 64\)"):
        view_features(read_patches(tmp_path), encoder, 1, cache)
    path.write_bytes(b"x")
    with pytest.raises(SlideError, match=r"view00\.npy: found no readable \.npy file"):
        view_features(read_patches(tmp_path), encoder, 1, cache)


def test_a_feature_that_float16_cannot_hold_is_refused_and_nothing_is_kept(tmp_path):
    class Loud:
        id, feature_dim, input_px, on_gpu = "loud@1", 4, None, False

        def encode(self, patches):
            return np.full((len(patches), 4), 1e6, np.float32)

    write_archive(tmp_path / IDC_PATCHES, [2, 0])
    with pytest.raises(SlideError, match="a feature of loud@1 in view 0 that is not finite in float16"):
        view_features(read_patches(tmp_path), Loud(), 1, tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.npy")) == []
