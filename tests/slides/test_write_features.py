"""Our own file: written whole or not at all, and its identity tells one writing from the next."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from vllm_wsi.errors import SlideError
from vllm_wsi.slides import SlideIdentity, features_in_memory, open_features, write_features

N, D = 9, 8
FEATURES = np.random.default_rng(5).standard_normal((N, D))
COORDS = np.arange(2 * N).reshape(N, 2) * 512
METADATA = {"slide_id": "S1", "encoder": "uni@abc123", "mpp": "0.499", "note": "Gewebe «rechts»"}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("coords", [COORDS, COORDS.astype(np.int32), COORDS.astype(float), None])
def test_what_is_written_is_read_back(dtype: str, coords: np.ndarray | None, tmp_path: Path):
    features = FEATURES.astype(dtype)
    write_features(tmp_path / "slide.safetensors", features, coords, METADATA)
    with open_features(tmp_path / "slide.safetensors") as slide:
        assert (slide.num_patches, slide.feature_dim, slide.dtype) == (N, D, features.dtype.name)
        assert slide.metadata == METADATA
        assert np.array_equal(slide.read_rows(0, N), features)
        found = slide.read_coords()
        assert found is None if coords is None else np.array_equal(found, COORDS)
        assert slide.coord_unit == (None if coords is None else "px")


def test_a_strided_view_is_written_in_its_own_order(tmp_path: Path):
    write_features(tmp_path / "slide.safetensors", FEATURES.T[::2], COORDS[: D // 2])
    with open_features(tmp_path / "slide.safetensors") as slide:
        assert np.array_equal(slide.read_rows(0, D // 2), FEATURES.T[::2])


def test_the_safetensors_library_reads_our_file(tmp_path: Path):
    write_features(tmp_path / "slide.safetensors", FEATURES.astype(np.float16), COORDS)
    tensors = load_file(tmp_path / "slide.safetensors")
    assert {key: values.dtype.name for key, values in tensors.items()} == {"features": "float16", "coords": "int32"}
    assert np.array_equal(tensors["features"], FEATURES.astype(np.float16))
    assert np.array_equal(tensors["coords"], COORDS)


@pytest.mark.parametrize(
    ("features", "coords", "metadata", "said"),
    [
        (FEATURES[0], None, None, "features: found float64 of shape (8,), wanted float (N, d)"),
        (FEATURES[None], None, None, "features: found float64 of shape (1, 9, 8)"),
        (FEATURES[:0], None, None, "features: found float64 of shape (0, 8)"),
        (FEATURES[:, :0], None, None, "features: found float64 of shape (9, 0)"),
        (COORDS, None, None, "features: found int64 of shape (9, 2)"),
        (FEATURES.astype(np.longdouble), None, None, f"features: found {np.dtype(np.longdouble)} of shape (9, 8)"),
        (FEATURES, COORDS[1:], None, "coords: found int64 of shape (8, 2), wanted whole level-0 pixels"),
        (FEATURES, COORDS[:, :1], None, "coords: found int64 of shape (9, 1)"),
        (FEATURES, COORDS + 0.5, None, "coords: found float64 of shape (9, 2), wanted whole level-0 pixels"),
        (FEATURES, COORDS + (1 << 32), None, "coords: found int64 of shape (9, 2), wanted whole level-0 pixels"),
        (FEATURES, COORDS, {"mpp": 0.499}, "metadata mpp: found str -> float, wanted a string"),
        (FEATURES, COORDS, {7: "mpp"}, "metadata 7: found int -> str, wanted a string"),
    ],
)
def test_what_cannot_be_a_slide_is_refused_and_nothing_is_written(features, coords, metadata, said, tmp_path: Path):
    with pytest.raises(SlideError) as caught:
        write_features(tmp_path / "slide.safetensors", features, coords, metadata)
    assert said in str(caught.value)
    assert "slide.safetensors" in str(caught.value)
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_midway_leaves_nothing_behind(step: str, error: BaseException, tmp_path: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_features(tmp_path / "slide.safetensors", FEATURES)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_midway_leaves_the_old_file_as_it_was(tmp_path: Path, monkeypatch):
    path = tmp_path / "slide.safetensors"
    write_features(path, FEATURES)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_features(path, -FEATURES)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_an_open_slide_keeps_its_rows_when_its_file_is_replaced(tmp_path: Path):
    path = tmp_path / "slide.safetensors"
    write_features(path, FEATURES)
    with open_features(path) as old:
        write_features(path, -FEATURES)
        assert np.array_equal(old.read_rows(0, N), FEATURES)
        with open_features(path) as new:
            assert np.array_equal(new.read_rows(0, N), -FEATURES)
    assert list(tmp_path.iterdir()) == [path]


def test_identity_stays_while_the_file_does_and_changes_with_it(tmp_path: Path):
    path = tmp_path / "slide.safetensors"
    write_features(path, FEATURES)
    first, again = SlideIdentity.of_file(path), SlideIdentity.of_file(path)
    assert first == again
    with open_features(path) as slide:
        assert slide.identity == first
    write_features(path, -FEATURES)
    replaced = SlideIdentity.of_file(path)
    assert (replaced.path, replaced.size) == (first.path, first.size)
    assert replaced != first


def test_identity_changes_when_old_times_are_put_on_another_file(tmp_path: Path):
    path = tmp_path / "slide.safetensors"
    write_features(path, FEATURES)
    first = SlideIdentity.of_file(path)
    write_features(path, -FEATURES)
    os.utime(path, ns=(first.mtime_ns, first.mtime_ns))
    replaced = SlideIdentity.of_file(path)
    assert replaced.mtime_ns == first.mtime_ns
    assert replaced != first


def test_a_symlink_has_the_identity_of_its_target(tmp_path: Path):
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "slide.safetensors", tmp_path / "link.safetensors"
    write_features(target, FEATURES)
    link.symlink_to(target)
    with open_features(link) as slide:
        assert slide.identity == SlideIdentity.of_file(target)
        assert slide.identity.path == str(target.resolve())
        assert slide.name == str(link)


def test_identity_in_memory_is_that_of_the_values():
    first, same, other = map(features_in_memory, (FEATURES, FEATURES.copy(), -FEATURES))
    assert first.identity == same.identity
    assert first.identity != other.identity
    assert first.identity != features_in_memory(FEATURES.reshape(D, N)).identity
