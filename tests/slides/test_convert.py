"""`vllm-wsi convert`: every readable format to ours, with nothing lost; resumed, in folders, by several workers."""

import csv
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch

from vllm_wsi.cli.app import main
from vllm_wsi.errors import SlideError
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import open_features, write_features
from vllm_wsi.slides.convert_features import SOURCE, Conversion, convert, convert_many, find_conversions
from vllm_wsi.slides.encoder_names import recorded_encoder
from vllm_wsi.slides.places import origin, patch_size
from vllm_wsi.slides.units import KEPT_UNIT, KEPT_UNIT_SCALE, KEPT_UNIT_SOURCE

from .test_feature_formats import CASES, F32, STAMP, Case, D, h5, raw

FLOAT16_MAX = 65504.0


def statuses(out: Path) -> dict[str, tuple[str, str]]:
    with open(out / "convert_summary.csv", newline="") as file:
        return {Path(row["slide"]).name: (row["status"], row["reason"]) for row in csv.DictReader(file)}


def assert_nothing_is_lost(source: Path, made: Path, encoder: str | None = None) -> None:
    """All that any reader asks of a slide: bits, places, their unit and who says it, sizes, origin, encoder."""
    with open_features(source, encoder) as one, open_features(made) as other:
        shape = one.num_patches, one.feature_dim, one.dtype
        assert (other.num_patches, other.feature_dim, other.dtype) == shape
        assert np.array_equal(one.read_rows(0, shape[0]), other.read_rows(0, shape[0]), equal_nan=one.dtype[0] == "f")
        places = [slide.read_stored_coords() for slide in (one, other)]
        if places[0] is None:
            assert places[1] is None
        else:
            assert np.array_equal(*places)
            assert other.unit == one.unit
            sizes = [patch_size(slide.metadata, slide.read_coords(), slide.unit) for slide in (one, other)]
            assert sizes[0] == sizes[1]
        assert origin("a", one.metadata, None) == origin("a", other.metadata, None)
        assert recorded_encoder(other.metadata) == recorded_encoder(one.metadata)
        added = {SOURCE, KEPT_UNIT, KEPT_UNIT_SOURCE, KEPT_UNIT_SCALE}
        assert {k: v for k, v in other.metadata.items() if k not in added} == one.metadata


def assert_same_selection(source: Path, made: Path, encoder: str | None = None, k: int = 5) -> None:
    with open_features(source, encoder) as one, open_features(made) as other:
        scorer = seeded_scorer("patch", one.feature_dim, 8, seed=1).requires_grad_(False).weights()
        found = [SlideSelector(scorer, k).select(slide) for slide in (one, other)]
    assert torch.equal(found[0].indices, found[1].indices)
    assert torch.equal(found[0].scores, found[1].scores)
    assert np.array_equal(found[0].coords, found[1].coords) if found[0].coords is not None else found[1].coords is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_converted_file_is_the_same_slide(case: Case, tmp_path: Path):
    source, made = tmp_path / case.name, tmp_path / "out" / "a.safetensors"
    case.write(source)
    assert convert(Conversion(source, made), case.encoder) == case.num_patches
    assert_nothing_is_lost(source, made, case.encoder)
    assert_same_selection(source, made, case.encoder)
    assert [path.name for path in made.parent.iterdir()] == ["a.safetensors"]
    # The library reads it too, whatever the widths of features and coordinates are.
    features = safetensors.torch.load_file(made)["features"]
    assert torch.equal(features.view(torch.uint8), torch.from_numpy(case.rows.copy()).contiguous().view(torch.uint8))


def test_the_real_slide_of_mopadi_is_the_same(shared_data, tmp_path):
    source = shared_data / "features/mopadi_TCGA-AD-6964/features.h5"
    assert main(["convert", str(source), "--out", str(tmp_path)]) == 0
    assert_nothing_is_lost(source, tmp_path / "features.safetensors")
    assert_same_selection(source, tmp_path / "features.safetensors", k=32)


UNITS = [
    ("millimetres", {"/": {"unit": "mm", "tile_size": 0.256}}, "um", "file"),
    ("pixels by name", {"/": {"unit": "px"}}, "px", "file"),
    ("microns by the format", {"/": {"tile_size_um": 256.0}}, "um", "format"),
    ("STAMP's first format", {"/": {"tile_size": 224}}, "um", "format"),
    ("STAMP's first format, guessed by its steps", {}, "um", "guess"),
]


@pytest.mark.parametrize(("attrs", "unit", "by"), [case[1:] for case in UNITS], ids=[case[0] for case in UNITS])
def test_the_unit_and_who_says_it_are_kept(attrs, unit, by, tmp_path: Path):
    source, made = tmp_path / "a.h5", tmp_path / "out" / "a.safetensors"
    coords = np.stack([np.arange(21) % 5, np.arange(21) // 5], axis=1) * 224
    h5(source, {"feats": F32, "coords": coords}, attrs)
    with open_features(source) as slide:
        assert (slide.coord_unit, slide.unit_source) == (unit, by)
    convert(Conversion(source, made))
    assert_nothing_is_lost(source, made)
    assert np.array_equal(safetensors.torch.load_file(made)["coords"], coords)  # the source's own numbers
    again = tmp_path / "again" / "a.safetensors"
    convert(Conversion(made, again))  # of a file that was converted before
    assert_nothing_is_lost(source, again)


def test_a_guess_stays_a_guess(tmp_path: Path):
    source, made = tmp_path / "a.npz", tmp_path / "out" / "a.safetensors"
    np.savez(source, features=F32, coords=np.arange(42).reshape(21, 2))
    convert(Conversion(source, made))
    assert_nothing_is_lost(source, made)
    with open_features(made) as slide:
        assert slide.unit_source == "guess"
        assert any("a guess" in remark for remark in slide.remarks)


@pytest.mark.parametrize(("unit", "source"), [("mm", "file"), ("um", "nobody"), ("px", ""), ("unknown", "file")])
def test_a_converted_file_whose_unit_was_changed_is_refused(unit, source, tmp_path: Path):
    metadata = {KEPT_UNIT: unit, KEPT_UNIT_SOURCE: source}
    write_features(tmp_path / "a.safetensors", F32, np.zeros((21, 2), np.int32), metadata)
    with pytest.raises(SlideError, match=rf"a\.safetensors: converted_unit: found '{unit}' by '{source}', wanted px"):
        open_features(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("scale", "found"), [({}, "none"), ({KEPT_UNIT_SCALE: "0"}, "'0'")])
def test_a_converted_file_that_does_not_say_what_its_numbers_are_is_refused(scale, found, tmp_path: Path):
    metadata = {KEPT_UNIT: "um", KEPT_UNIT_SOURCE: "guess"} | scale
    write_features(tmp_path / "a.safetensors", F32, np.zeros((21, 2), np.int32), metadata)
    with pytest.raises(SlideError, match=rf"a\.safetensors: converted_unit_scale: found {found}, wanted a number"):
        open_features(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.int64, np.float16, ">i4", ">f8"])
def test_coordinates_of_every_width_keep_their_values(dtype, tmp_path: Path):
    coords = np.arange(42).reshape(21, 2).astype(dtype)
    h5(tmp_path / "a.h5", {"features": raw("float16"), "coords": coords})
    convert(Conversion(tmp_path / "a.h5", tmp_path / "a.safetensors"))
    assert_nothing_is_lost(tmp_path / "a.h5", tmp_path / "a.safetensors")


def test_a_slide_longer_than_a_chunk_is_converted_whole(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("vllm_wsi.slides.convert_features.CHUNK_BYTES", 8 * D * 4)
    np.save(tmp_path / "a.npy", F32)
    convert(Conversion(tmp_path / "a.npy", tmp_path / "a.safetensors"))
    assert_nothing_is_lost(tmp_path / "a.npy", tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_float16_rounds_to_the_nearest(dtype, tmp_path: Path):
    values = torch.from_numpy(F32).to(getattr(torch, dtype), copy=True)  # other tests share F32
    values[0, :3] = torch.tensor([float("nan"), float("inf"), FLOAT16_MAX if dtype != "bfloat16" else 65280.0])
    torch.save(values, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), "--out", str(tmp_path), "--dtype", "float16"]) == 0
    with open_features(tmp_path / "a.safetensors") as slide:
        assert slide.dtype == "float16"
        assert np.array_equal(slide.read_rows(0, 21), values.to(torch.float16).numpy(), equal_nan=True)


@pytest.mark.parametrize(("dtype", "value"), [("float32", 65520.0), ("float64", -1e9), ("bfloat16", 1e38)])
def test_a_value_that_float16_cannot_hold_is_an_error_and_nothing_is_written(dtype, value, tmp_path: Path):
    values = torch.from_numpy(F32).to(getattr(torch, dtype), copy=True)  # other tests share F32
    values[7, 1] = value
    torch.save(values, tmp_path / "a.pt")
    out = tmp_path / "out"
    (outcome,) = convert_many([Conversion(tmp_path / "a.pt", out / "a.safetensors")], dtype="float16")
    assert outcome.status == "failed"
    assert "a.pt: features: found " in outcome.reason
    assert "wanted at most 65504 in float16" in outcome.reason
    assert list(out.iterdir()) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Feature files of several formats in a tree, with what is none beside them."""
    root = tmp_path / "features"
    (root / "a" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    np.save(root / "one.npy", F32)
    np.save(root / ".hidden" / "no.npy", F32)
    h5(root / "a" / "two.h5", {"feats": F32, "coords": np.zeros((21, 2))}, {"/": STAMP})
    by_name = {case.name: case for case in CASES}
    by_name["slidechat.csv"].write(root / "a" / "deep" / "three.csv")
    by_name["lazyslide.zarr"].write(root / "four.zarr")
    (root / "a" / "labels.csv").write_text("slide,label\nS1,1\n")
    return root


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_folder_keeps_its_tree_and_a_broken_file_stops_no_other(folder: Path, tmp_path: Path, workers, capsys):
    (folder / "broken.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    out = tmp_path / "out"
    assert main(["convert", str(folder), "--out", str(out), "--workers", workers]) == 1
    made = sorted(str(path.relative_to(out)) for path in out.rglob("*.safetensors"))
    assert made == ["a/deep/three.safetensors", "a/two.safetensors", "four.safetensors", "one.safetensors"]
    assert {name: status for name, (status, _) in statuses(out).items()} == {
        "one.npy": "done", "two.h5": "done", "three.csv": "done", "four.zarr": "done", "broken.h5": "failed",
    }  # fmt: skip
    said = capsys.readouterr()
    assert "4 done, 0 skipped, 1 failed; see " in said.out
    assert "broken.h5: found an HDF5 signature but no readable file" in said.err
    for source, place in (("a/two.h5", "a/two"), ("four.zarr", "four"), ("a/deep/three.csv", "a/deep/three")):
        assert_nothing_is_lost(folder / source, out / f"{place}.safetensors")


def test_what_is_there_of_the_same_source_is_skipped_and_a_changed_one_converted_again(folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert main(["convert", str(folder), "--out", str(out)]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    np.save(folder / "one.npy", F32[:7])
    assert main(["convert", str(folder), "--out", str(out)]) == 0
    changed = {path.name for path, mtime in before.items() if path.stat().st_mtime_ns != mtime}
    assert changed == {"one.safetensors"}
    assert statuses(out)["three.csv"] == ("skipped", "is there already")
    assert_nothing_is_lost(folder / "one.npy", out / "one.safetensors")


def test_other_features_in_its_place_are_not_overwritten(tmp_path: Path):
    np.save(tmp_path / "a.npy", F32)
    out = tmp_path / "out"
    out.mkdir()
    write_features(out / "a.safetensors", F32[:3])
    before = (out / "a.safetensors").read_bytes()
    assert main(["convert", str(tmp_path / "a.npy"), "--out", str(out)]) == 1
    assert "a.safetensors: found other features there" in statuses(out)["a.npy"][1]
    assert (out / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"), [("name", "'a.npy', wanted 'a.pt'"), ("dtype", "'same', wanted 'float16'")]
)
def test_a_file_made_of_another_source_or_in_another_way_is_not_overwritten(change, said, tmp_path: Path):
    np.save(tmp_path / "a.npy", F32)
    torch.save(torch.from_numpy(F32), tmp_path / "a.pt")
    out = str(tmp_path / "out")
    assert main(["convert", str(tmp_path / "a.npy"), "--out", out]) == 0
    asked = ["a.pt", "same"] if change == "name" else ["a.npy", "float16"]
    assert main(["convert", str(tmp_path / asked[0]), "--out", out, "--dtype", asked[1]]) == 1
    assert f"found one made of {change} {said}; choose another --out" in statuses(tmp_path / "out")[asked[0]][1]


def test_one_of_several_sets_is_chosen(tmp_path: Path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features/uni"], file["features/conch"] = F32, F32 * 2
        file["coords"] = np.zeros((21, 5), int)
    assert main(["convert", str(tmp_path / "a.h5"), "--out", str(tmp_path / "out")]) == 1
    assert main(["convert", str(tmp_path / "a.h5"), "--out", str(tmp_path / "out"), "--encoder", "conch"]) == 0
    assert_nothing_is_lost(tmp_path / "a.h5", tmp_path / "out" / "a.safetensors", "conch")


def test_two_files_of_one_place_and_a_file_upon_itself_are_refused(tmp_path: Path):
    np.save(tmp_path / "a.npy", F32)
    write_features(tmp_path / "a.safetensors", F32)
    with pytest.raises(SlideError, match="found two slides for it"):
        find_conversions([tmp_path], tmp_path / "out")
    with pytest.raises(SlideError, match="found the folder of the sources as --out"):
        find_conversions([tmp_path], tmp_path)
    with pytest.raises(SlideError, match="found the source's own place"):
        find_conversions([tmp_path / "a.safetensors"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SlideError, match="empty: found no feature files"):
        find_conversions([tmp_path / "empty"], tmp_path / "out")


def test_results_below_the_sources_are_no_sources(tmp_path: Path):
    np.save(tmp_path / "a.npy", F32)
    for _ in range(2):
        assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert [job.slide.name for job in find_conversions([tmp_path], tmp_path / "out")] == ["a.npy"]


def test_a_source_that_changes_while_it_is_read_leaves_nothing(tmp_path: Path, monkeypatch):
    source, made = tmp_path / "a.npy", tmp_path / "out" / "a.safetensors"
    np.save(source, F32)
    from vllm_wsi.slides import convert_features

    blocks = convert_features._feature_blocks

    def touch(*arguments):
        os.utime(source)
        yield from blocks(*arguments)

    monkeypatch.setattr(convert_features, "_feature_blocks", touch)
    with pytest.raises(SlideError, match=r"a\.npy: found a file that changed while it was read"):
        convert(Conversion(source, made))
    assert list(made.parent.iterdir()) == []
