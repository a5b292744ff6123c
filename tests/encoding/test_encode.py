"""From slide images to feature files: one slide, folders of them, and everything that can be wrong with either."""

import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_wsi.cli.app import main
from vllm_wsi.encoding.colour_texture import ColourTexture
from vllm_wsi.encoding.encode_many import encode_many, find_jobs
from vllm_wsi.encoding.encode_slide import EncodeSettings, encode_slide
from vllm_wsi.encoding.image import open_image, read_scaled
from vllm_wsi.encoding.patches import find_patches
from vllm_wsi.encoding.qc import PATCH, TISSUE
from vllm_wsi.errors import SlideError
from vllm_wsi.executors import LocalExecutor
from vllm_wsi.slides import open_features

from .slide_images import tissue_picture, write_ome_tiff, write_tiff

SMALL = EncodeSettings(patch_px=64)


def encode(*arguments: object) -> int:
    return main(["encode", *map(str, arguments), "--encoder", "colour-texture"])


def statuses(out: Path) -> dict[str, tuple[str, str]]:
    with open(out / "encode_summary.csv", newline="") as file:
        return {Path(row["slide"]).name: (row["status"], row["reason"]) for row in csv.DictReader(file)}


def assert_same_slide(one: Path, other: Path) -> None:
    """All but the order of the metadata, which the safetensors library shuffles."""
    with open_features(one) as a, open_features(other) as b:
        assert dict(a.metadata) == dict(b.metadata)
        assert np.array_equal(a.read_coords(), b.read_coords())
        assert np.array_equal(a.read_rows(0, a.num_patches), b.read_rows(0, b.num_patches))


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    """(image, feature file) of the real slide, by the command."""
    image, out = shared_data / "slides/CMU-1-Small-Region.svs", tmp_path_factory.mktemp("real")
    assert encode(image, "--out", out) == 0
    return image, out / "CMU-1-Small-Region.safetensors"


def test_the_real_slide_becomes_features_with_coordinates_and_what_made_them(real):
    with open_features(real[1]) as slide:
        assert (slide.feature_dim, slide.dtype, slide.coord_unit) == (64, "float16", "px")
        assert 35 <= slide.num_patches <= 45  # about 40 % of the slide is tissue
        wanted = {"encoder": "colour-texture@1", "mpp": "0.499", "patch_size": "224", "patch_size_level0": "224"}
        wanted |= {"width": "2220", "height": "2967", "slide_file": "CMU-1-Small-Region.svs", "patch_mpp": "0.5"}
        assert wanted.items() <= dict(slide.metadata).items()
        coords = slide.read_coords()
    assert (coords >= 0).all()
    assert (coords + 224 <= [2220, 2967]).all()
    # The tissue is one vertical strip.
    assert coords[:, 0].min() > 500
    assert coords[:, 0].max() < 1800


def test_each_row_is_the_encoding_of_the_pixels_at_its_coordinates(real):
    image_path, features_path = real
    with open_features(features_path) as slide, open_image(image_path) as image:
        coords, rows = slide.read_coords(), slide.read_rows(0, slide.num_patches)
        for row in (0, 17, len(coords) - 1):
            x, y = coords[row].tolist()
            pixels = np.asarray(image.read_region((x, y), 0, (224, 224)).convert("RGB"))
            assert np.array_equal(ColourTexture().encode(pixels[None])[0].astype(np.float16), rows[row])


def test_encoding_twice_gives_the_same_features(real, tmp_path):
    encode_slide(real[0], tmp_path / "again.safetensors", ColourTexture(), EncodeSettings())
    assert_same_slide(tmp_path / "again.safetensors", real[1])


def test_doctor_finds_nothing_wrong_with_an_encoded_slide(real, capsys):
    assert main(["doctor", str(real[1])]) == 0
    printed = capsys.readouterr().out
    assert "usable" in printed
    assert "note:" not in printed
    assert "colour-texture@1" in printed


@pytest.mark.parametrize("mpp", [0.25, 0.502, 0.55])
def test_patches_have_the_asked_size_in_microns_whatever_the_slides_mpp(tmp_path, mpp):
    path = write_tiff(tmp_path / "a.tiff", tissue_picture(1024, 768), mpp)
    encode_slide(path, tmp_path / "a.safetensors", ColourTexture(), SMALL)
    with open_features(tmp_path / "a.safetensors") as slide:
        size = round(64 * 0.5 / mpp)
        assert slide.metadata["patch_size_level0"] == str(size)
        coords = slide.read_coords()
    # On the tissue, which lies in the middle half.
    assert len(coords) >= 4
    assert (coords + 0.35 * size >= [256 - size, 192 - size]).all()
    assert (coords + size <= [768 + size, 576 + size]).all()


def test_an_ome_tiff_goes_the_same_way(tmp_path):
    path = write_ome_tiff(tmp_path / "a.ome.tif", tissue_picture(1024, 768), 0.5)
    result = encode_slide(path, tmp_path / "a.safetensors", ColourTexture(), SMALL)
    flat = write_tiff(tmp_path / "flat.tiff", tissue_picture(1024, 768), 0.5)
    assert encode_slide(flat, tmp_path / "flat.safetensors", ColourTexture(), SMALL).num_patches == result.num_patches
    with open_features(tmp_path / "a.safetensors") as one, open_features(tmp_path / "flat.safetensors") as other:
        assert np.array_equal(one.read_coords(), other.read_coords())
        assert np.array_equal(one.read_rows(0, one.num_patches), other.read_rows(0, other.num_patches))


def test_patches_come_row_by_row_and_none_twice(tmp_path):
    with open_image(write_tiff(tmp_path / "a.tiff", tissue_picture(2048, 1536))) as image:
        coords = find_patches(image, "a", 0.5, 64).corners
    assert len(np.unique(coords, axis=0)) == len(coords)
    assert np.array_equal(coords, coords[np.lexsort((coords[:, 0], coords[:, 1]))])


def test_without_a_search_for_tissue_the_whole_slide_is_taken(tmp_path):
    with open_image(write_tiff(tmp_path / "a.tiff", np.full((512, 640, 3), 243, np.uint8))) as image:
        assert len(find_patches(image, "a", 0.5, 128, "none").corners) == 4 * 5
        with pytest.raises(SlideError, match="found no tissue"):
            find_patches(image, "a", 0.5, 128)


@pytest.mark.parametrize(
    ("file", "options", "sentence"),
    [
        ("boxes.tiff", [], "mpp: found 352.778, an overview, wanted at most 0.55"),
        ("small.svs", [], "found 16 x 16 pixels, wanted at least one patch of 224 x 224"),
        ("broken/unreadable.svs", [], "found damaged pixels (Bogus marker length)"),
        ("broken/unopenable.tiff", [], "openslide says: Unsupported TIFF compression"),
        ("CMU-1-Small-Region.svs", ["--mpp", "5"], "mpp: found 5, an overview"),
        ("CMU-1-Small-Region.svs", ["--patch-px", "4000"], "wanted at least one patch of"),
    ],
)
def test_every_odd_slide_has_its_own_sentence_and_leaves_no_file(
    shared_data, tmp_path, capsys, file, options, sentence
):
    assert encode(shared_data / "slides" / file, "--out", tmp_path / "out", *options) == 1
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert "0 done, 0 skipped, 1 failed" in printed.out
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["encode_summary.csv"]


def test_a_slide_without_mpp_is_an_error_and_not_a_guess(tmp_path, capsys):
    path = write_tiff(tmp_path / "a.tiff", tissue_picture(1024, 768), mpp=None)
    assert encode(path, "--out", tmp_path / "out", "--patch-px", 64) == 1
    assert "mpp: found none in the slide, wanted it given (--mpp)" in capsys.readouterr().err
    assert encode(path, "--out", tmp_path / "out", "--patch-px", 64, "--mpp", 0.5) == 0


def test_an_overview_that_is_asked_for_coarse_patches_is_encoded(shared_data, tmp_path):
    file = shared_data / "slides/boxes.tiff"
    options = ["--patch-mpp", "353", "--patch-px", "50", "--tissue", "none"]
    assert encode(file, "--out", tmp_path, *options) == 0
    with open_features(tmp_path / "boxes.safetensors") as slide:
        assert slide.num_patches == 6 * 5


def test_a_folder_goes_on_past_what_fails_and_a_second_run_encodes_only_what_is_missing(tmp_path, capsys, shared_data):
    folder, out = tmp_path / "slides", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    write_tiff(folder / "a.tiff", tissue_picture(640, 512, 1))
    write_tiff(folder / "deep/a.tiff", tissue_picture(640, 512, 2))
    write_ome_tiff(folder / "b.ome.tif", tissue_picture(640, 512, 3), 0.5)
    (folder / "bad.svs").write_bytes((shared_data / "slides/broken/unreadable.svs").read_bytes())
    (folder / "notes.txt").write_text("not a slide")
    (folder / ".hidden.tiff").write_bytes(b"II*\0")
    arguments = (folder, "--out", out, "--patch-px", 64, "--workers", 2)
    assert encode(*arguments) == 1
    assert {name: status for name, (status, _) in statuses(out).items()} == {
        "a.tiff": "done",
        "b.ome.tif": "done",
        "bad.svs": "failed",
    }
    assert "3 done, 0 skipped, 1 failed" in capsys.readouterr().out
    assert (out / "deep/a.safetensors").exists()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    (out / "a.safetensors").unlink()
    assert encode(*arguments) == 1
    assert "1 done, 2 skipped, 1 failed" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert {path for path in before if before[path] == after[path]} == before.keys() - {out / "a.safetensors"}
    assert not list(out.rglob(".*"))


def test_several_workers_write_what_one_writes(tmp_path):
    for seed in range(3):
        write_tiff(tmp_path / f"{seed}.tiff", tissue_picture(640, 512, seed))
    for workers in (1, 2):
        jobs = find_jobs([tmp_path], tmp_path / f"out{workers}")
        outcomes = encode_many(jobs, "colour-texture", SMALL, executor=LocalExecutor(workers))
        assert [Path(o.slide).name for o in outcomes] == ["0.tiff", "1.tiff", "2.tiff"]
        assert {o.status for o in outcomes} == {"done"}
    for seed in range(3):
        assert_same_slide(*(tmp_path / f"out{workers}/{seed}.safetensors" for workers in (1, 2)))


def test_a_slide_that_takes_its_process_down_stops_no_other(tmp_path, monkeypatch):
    """The reader of `bomb` ends its process, as a damaged slide in a native library can."""
    for seed, name in enumerate(("a", "bomb", "c")):
        write_tiff(tmp_path / f"{name}.tiff", tissue_picture(640, 512, seed))
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, signal\n"
        "import vllm_wsi.encoding.encode_slide as encode\n"
        "opened = encode.open_image\n"
        "def open_image(path, channels):\n"
        f"    if path.name == 'bomb.tiff': os.kill(os.getpid(), {int(signal.SIGSEGV)})\n"
        "    return opened(path, channels)\n"
        "encode.open_image = open_image\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(hook))
    jobs = find_jobs([tmp_path], tmp_path / "out")
    outcomes = encode_many(jobs, "colour-texture", SMALL, executor=LocalExecutor(2))
    assert [o.status for o in outcomes] == ["done", "failed", "done"]
    assert "bomb.tiff: found a slide that ends its reader" in outcomes[1].reason


def test_a_feature_file_that_was_made_another_way_is_neither_kept_nor_overwritten(tmp_path, capsys):
    path = write_tiff(tmp_path / "a.tiff", tissue_picture(640, 512))
    assert encode(path, "--out", tmp_path, "--patch-px", 64) == 0
    before = (tmp_path / "a.safetensors").read_bytes()
    for options in (["--patch-px", "32"], ["--patch-px", "64", "--dtype", "float32"]):
        assert encode(path, "--out", tmp_path, *options) == 1
        assert "choose another --out" in capsys.readouterr().err
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_two_slides_that_would_share_a_feature_file_are_refused_before_anything_is_read(tmp_path, capsys):
    write_tiff(tmp_path / "a.tiff", tissue_picture(300, 300))
    write_tiff(tmp_path / "a.tif", tissue_picture(300, 300))
    assert encode(tmp_path, "--out", tmp_path / "out") == 1
    assert "found two slides for it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_slides_is_an_error(tmp_path, capsys):
    assert encode(tmp_path, "--out", tmp_path / "out") == 1
    assert "found no slide images" in capsys.readouterr().err


def test_a_run_that_is_stopped_leaves_no_half_written_file(tmp_path):
    path, out = write_tiff(tmp_path / "a.tiff", tissue_picture(640, 512)), tmp_path / "out" / "a.safetensors"

    class Stopped(ColourTexture):
        def encode(self, patches):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_slide(path, out, Stopped(), SMALL)
    assert not out.parent.exists() or not os.listdir(out.parent)


@pytest.mark.parametrize("value", [1e6, np.nan])
def test_features_that_the_files_dtype_cannot_hold_are_refused(tmp_path, value):
    class Large(ColourTexture):
        def encode(self, patches):
            return np.full((len(patches), 64), value, np.float32)

    path = write_tiff(tmp_path / "a.tiff", tissue_picture(640, 512))
    with pytest.raises(SlideError, match="not finite in float16"):
        encode_slide(path, tmp_path / "a.safetensors", Large(), SMALL)


def test_damage_in_the_middle_of_a_slide_is_found_and_leaves_no_file(tmp_path):
    path = write_tiff(tmp_path / "a.tiff", tissue_picture(1024, 1024))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    path.write_bytes(data)
    with pytest.raises(SlideError, match=r"a\.tiff: found damaged pixels"):
        encode_slide(path, tmp_path / "a.safetensors", ColourTexture(), SMALL)
    assert not (tmp_path / "a.safetensors").exists()


def test_the_tiles_of_one_tissue_class_are_nearer_to_each_other_than_to_another(shared_data):
    """Real H&E tiles: fat and empty glass against tumour and lymphocytes, by colour and texture alone."""
    from PIL import Image

    means = {}
    for folder in ("01_TUMOR", "04_LYMPHO", "07_ADIPOSE", "08_EMPTY"):
        files = sorted((shared_data / "tiles_kather2016" / folder).glob("*.tif"))
        tiles = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        means[folder] = ColourTexture().encode(tiles)
    for folder, own in means.items():
        centre = own.mean(axis=0)
        spread = np.linalg.norm(own - centre, axis=1).mean()
        others = [np.linalg.norm(other.mean(axis=0) - centre) for name, other in means.items() if name != folder]
        assert spread < min(others)


def test_a_patch_is_read_at_the_level_that_fits(tmp_path):
    """Of a pyramid the patches come from the level next to the asked scale: their pixels tell which."""
    picture = tissue_picture(1024, 1024)
    with open_image(write_ome_tiff(tmp_path / "a.ome.tif", picture)) as image:
        assert np.array_equal(read_scaled(image, "a", 256, 256, 256, 256, (64, 64)), picture[256:512:4, 256:512:4])


def test_the_summary_tells_tissue_and_patches_and_a_picture_shows_them(tmp_path):
    folder, out, qc = tmp_path / "slides", tmp_path / "out", tmp_path / "qc"
    (folder / "deep").mkdir(parents=True)
    picture = tissue_picture(640, 512)
    write_tiff(folder / "deep/a.tiff", picture)
    write_tiff(folder / "none.tiff", np.full((512, 640, 3), 243, np.uint8))
    for _ in range(2):  # a slide that is there already tells it from its features
        assert encode(folder, "--out", out, "--qc", qc, "--patch-px", 64, "--workers", 1) == 1
        with open(out / "encode_summary.csv", newline="") as file:
            row, other = csv.DictReader(file)
        assert float(row["tissue_share"]) == pytest.approx(0.25, abs=0.04)  # the middle half, each way
        assert int(row["patches"]) == 5 * 4
        assert row["warning"] == ""
        assert (other["status"], other["tissue_share"], other["patches"]) == ("failed", "", "0")
    assert [path.relative_to(qc).as_posix() for path in qc.rglob("*.*")] == ["deep/a.qc.png"]
    drawn = np.asarray(Image.open(qc / "deep/a.qc.png")).astype(int)
    scale = drawn.shape[1] / 640
    assert drawn.shape == (614, 768, 3)
    with open_features(out / "deep/a.safetensors") as slide:
        corners = slide.read_coords()
    for x, y in corners.tolist():  # each patch has its upper side in blue, or in green where the tissue ends there
        side = drawn[round(y * scale) - 8 : round(y * scale) + 9, round((x + 32) * scale)]
        assert min(np.abs(side - colour).sum(axis=1).min() for colour in (PATCH, TISSUE)) == 0
    outside = drawn[: round(100 * scale)]
    assert np.abs(outside - 243).max() <= 1


def test_a_warning_goes_to_the_summary_and_to_the_screen(tmp_path, capsys):
    """Pieces that are smaller than the patches."""
    picture = np.full((1024, 1024, 3), 243, np.uint8)
    rng = np.random.default_rng(0)
    for y in range(20, 900, 128):
        for x in range(20, 900, 128):
            picture[y : y + 36, x : x + 36] = np.clip(rng.normal((170, 70, 150), 25, (36, 36, 3)), 0, 255)
    picture[500:640, 500:640] = np.clip(rng.normal((170, 70, 150), 25, (140, 140, 3)), 0, 255)
    path = write_tiff(tmp_path / "a.tiff", picture)
    assert encode(path, "--out", tmp_path, "--patch-px", 64) == 0
    printed = capsys.readouterr().err
    assert "of the tissue found, which lies in pieces smaller than they" in printed
    with open(tmp_path / "encode_summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert f"warning: {path}: {row['warning']}" in printed


def test_features_of_tissue_found_another_way_are_not_taken_for_finished(tmp_path, capsys):
    path = write_tiff(tmp_path / "a.tiff", tissue_picture(640, 512))
    assert encode(path, "--out", tmp_path, "--patch-px", 64) == 0
    for options in (["--tissue", "none"], ["--channels", "0,1,2"], ["--background", "0.5"]):
        assert encode(path, "--out", tmp_path, "--patch-px", 64, *options) == 1
        assert "choose another --out" in capsys.readouterr().err
    with open_features(tmp_path / "a.safetensors") as slide:
        assert (slide.metadata["tissue"], slide.metadata["channels"]) == ("otsu@2", "RGB")
        assert 0.2 < float(slide.metadata["tissue_share"]) < 0.3
