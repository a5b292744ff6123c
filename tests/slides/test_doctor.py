"""`vllm-wsi doctor`: what a file holds, what is odd about it, and an exit status for scripts."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch

from vllm_wsi.cli.app import main
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.slides import write_features
from vllm_wsi.slides.doctor import CHUNK_ROWS, examine
from vllm_wsi.slides.formats.named_arrays import NO_COORDS

N, D = 9, 4
ONES = np.ones((N, D), np.float16)
COORDS = np.stack([np.arange(N), np.arange(N) + 10], axis=1) * 512
SAID = {"patch_size_level0": "512"}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write_features(tmp_path / "good.safetensors", ONES, COORDS, SAID | {"encoder": "uni@abc123", "mpp": "0.499"})
    return tmp_path / "good.safetensors"


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    (tmp_path / "bad.h5").write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    return tmp_path / "bad.h5"


def written(folder: Path, features: np.ndarray, coords: np.ndarray | None = COORDS) -> Path:
    write_features(folder / "slide.safetensors", features, coords, SAID)
    return folder / "slide.safetensors"


def stamp(path: Path, **attrs: object) -> Path:
    with h5py.File(path, "w") as file:
        file["feats"], file["coords"] = ONES, COORDS * 0.499
        file.attrs.update({"unit": "um", "stamp_version": "2.4.0", **attrs})
    return path


def with_rows(count: int, changed: dict[int, float]) -> np.ndarray:
    features = np.ones((count, D), np.float16)
    for row, value in changed.items():
        features[row] = value
    return features


def test_a_good_file_is_described_in_full(good: Path):
    report = examine(good)
    assert report.error is None
    assert report.findings == []
    assert report.facts == {
        "format": "safetensors",
        "features": f"features: {N} patches x {D}, float16",
        "encoder": "uni@abc123",
        "coords": "x 0 .. 4096, y 5120 .. 9216 (level-0 pixels)",
        "coord unit": {"value": "px", "source": "format"},
        "patch size": {"value": 512.0, "unit": "px", "source": "file"},
        "origin": {"x": 0.0, "y": 0.0, "source": "unknown"},
        "metadata": report.facts["metadata"],
        "mean norm": "2",
    }
    assert set(report.facts["metadata"].split(", ")) == {"mpp=0.499", "patch_size_level0=512"}


def test_rows_with_nan_or_infinity_are_counted_and_left_out_of_the_norm(tmp_path: Path):
    features = with_rows(N, {1: np.nan, 4: np.inf, 5: -np.inf})
    features[7, 2] = np.nan
    report = examine(written(tmp_path, features))
    assert report.findings == ["4 patches hold NaN or infinities: they are never kept"]
    assert report.facts["mean norm"] == "2"
    assert report.error is None


def test_rows_of_every_chunk_are_counted(tmp_path: Path):
    last = 2 * CHUNK_ROWS
    features = with_rows(last + 1, {0: np.nan, CHUNK_ROWS - 1: np.nan, CHUNK_ROWS: np.nan, last: np.nan, 5: 0})
    report = examine(written(tmp_path, features, None))
    assert "4 patches hold NaN or infinities: they are never kept" in report.findings
    assert "1 patches are all zero" in report.findings
    assert report.facts["coords"] == "none"


def test_bfloat16_rows_are_read_as_numbers(tmp_path: Path):
    features = torch.full((N, D), 3.0, dtype=torch.bfloat16)
    features[2, 1] = torch.nan
    safetensors.torch.save_file({"features": features}, tmp_path / "bf16.safetensors")
    report = examine(tmp_path / "bf16.safetensors")
    assert report.facts["mean norm"] == "6"
    assert report.findings == [NO_COORDS, "1 patches hold NaN or infinities: they are never kept"]


def test_a_file_without_one_finite_patch_is_an_error(tmp_path: Path, capsys):
    path = written(tmp_path, np.full((N, D), np.nan, np.float16))
    assert examine(path).error == f"{path}: features: found no finite patch, wanted at least one"
    assert main(["doctor", str(path)]) == 1
    assert "usable" not in capsys.readouterr().out


@pytest.mark.parametrize(("attrs", "noted"), [({}, True), ({"mpp": 0.499}, False)], ids=["without", "with"])
def test_microns_are_noted_where_mpp_is_missing(attrs: dict, noted: bool, tmp_path: Path):
    report = examine(stamp(tmp_path / "stamp.h5", **attrs))
    assert report.facts["coords"].endswith("(microns)")
    assert ("coords: microns without mpp cannot be placed on the slide's pixels" in report.findings) == noted


def test_the_size_that_a_guessed_format_implies_is_a_guess(tmp_path: Path):
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["feats"], file["coords"] = ONES, COORDS // 512 * 224
    report = examine(tmp_path / "m.h5")
    assert report.facts["coord unit"] == {"value": "um", "source": "guess"}
    assert report.facts["patch size"] == {"value": 256.0, "unit": "um", "source": "guess"}
    assert "metadata" not in report.facts


def test_patches_that_share_a_place_are_noted(tmp_path: Path):
    assert examine(written(tmp_path, ONES, COORDS // 4096)).findings == ["coords: some patches share one place"]


def test_an_encoder_can_be_chosen(tmp_path: Path, capsys):
    path = tmp_path / "atlas.h5"
    with h5py.File(path, "w") as file:
        file["features/conch"], file["features/uni"] = ONES, ONES[:, :2]
    assert main(["doctor", str(path)]) == 1
    assert "found a group of conch, uni" in capsys.readouterr().out
    assert main(["doctor", str(path), "--encoder", "uni"]) == 0
    assert f"features/uni: {N} patches x 2, float16" in capsys.readouterr().out


def test_a_good_file_exits_with_0(good: Path, capsys):
    assert main(["doctor", str(good)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert (out[0], out[-1]) == (str(good), "  usable")


@pytest.mark.parametrize("bad_first", [True, False])
def test_a_bad_file_exits_with_1_and_the_others_are_still_reported(good: Path, bad: Path, bad_first: bool, capsys):
    files = [str(bad), str(good)] if bad_first else [str(good), str(bad)]
    assert main(["doctor", *files]) == 1
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if not line.startswith(" ")] == files
    assert out.count("  usable") == 1
    assert out.count(f"  error: {bad}: found an HDF5 signature but no readable file") == 1


def test_json_is_one_object_on_each_line(good: Path, bad: Path, tmp_path: Path, capsys):
    missing = tmp_path / "missing.h5"
    assert main(["doctor", "--json", str(good), str(bad), str(missing)]) == 1
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [report["path"] for report in reports] == [str(good), str(bad), str(missing)]
    assert [report["error"] is None for report in reports] == [True, False, False]
    assert all(set(report) == {"path", "error", "facts", "findings"} for report in reports)
    assert reports[0]["facts"]["encoder"] == "uni@abc123"
    assert "missing.h5: found no readable file" in reports[2]["error"]


def test_the_real_slide_is_usable(shared_data: Path):
    report = examine(shared_data / "features" / "mopadi_TCGA-AD-6964" / "features.h5")
    assert report.error is None
    assert report.facts["features"] == "feats: 777 patches x 512, float32"
    assert 12 < float(report.facts["mean norm"]) < 14
    assert report.facts["coord unit"] == {"value": "px", "source": "guess"}
    assert report.facts["patch size"] == {"value": 512.0, "unit": "px", "source": "guess"}
    assert report.findings == [
        "coords: nothing says their unit; taken as level-0 pixels because they are whole numbers: a guess",
        "patch size: nothing says it; taken from the spacing of the grid: a guess",
    ]


def test_a_checkpoint_tells_whether_it_takes_the_features(good: Path, tmp_path: Path, capsys):
    for name, encoder in (("same", "MahmoodLab/UNI"), ("other", "conch_v1"), ("silent", None)):
        SparseWSIConfig(feature_dim=D, encoder=encoder).save_pretrained(tmp_path / name)
    SparseWSIConfig(feature_dim=D + 1).save_pretrained(tmp_path / "wide")

    def asked(name: str, *more: str) -> tuple[int, str]:
        return main(["doctor", str(good), "--checkpoint", str(tmp_path / name), *more]), capsys.readouterr().out

    status, printed = asked("same")
    assert (status, f"{tmp_path}/same, encoder MahmoodLab/UNI (same)\n" in printed) == (0, True)
    status, printed = asked("other")
    assert (status, "error: " in printed) == (1, True)
    assert "encoder: found features of 'uni@abc123', wanted 'conch_v1', as the checkpoint was trained on" in printed
    status, printed = asked("other", "--encoder-mismatch", "allow")
    assert (status, "note: encoder: features of another encoder, which encoder_mismatch: allow" in printed) == (0, True)
    status, printed = asked("silent")
    assert (status, "note: encoder: the encoder of the checkpoint is not recorded" in printed) == (0, True)
    status, printed = asked("wide")
    assert (status, f"features: found d = {D}, wanted {D + 1}, as the checkpoint has it" in printed) == (1, True)
