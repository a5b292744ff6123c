"""One slide under several names is encoded once, and two slides that only seem one are both encoded."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from openslide import OpenSlide

from vllm_wsi.cli.app import main
from vllm_wsi.encoding.encode_many import find_jobs
from vllm_wsi.encoding.same_slide import SlideKey, find_same, slide_key

from .slide_images import tissue_picture, write_ome_tiff, write_tiff


def rows(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "encode_summary.csv", newline="") as file:
        return {Path(row["slide"]).name: row for row in csv.DictReader(file)}


def encode(*arguments: object) -> int:
    return main(["encode", *map(str, arguments), "--encoder", "colour-texture", "--patch-px", "64", "--workers", "1"])


def write_pyramid(path: Path, picture: np.ndarray, small: np.ndarray) -> Path:
    layout = {"photometric": "rgb", "compression": "deflate", "tile": (256, 256), "software": False}
    with tifffile.TiffWriter(path) as file:
        file.write(picture, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **layout)
        file.write(small, subfiletype=1, **layout)
    return path


@pytest.mark.parametrize("write", [write_tiff, write_ome_tiff])
@pytest.mark.parametrize("how", [shutil.copy, os.link, os.symlink])
def test_a_slide_under_two_names_is_encoded_once_and_the_summary_says_as_which(tmp_path, capsys, write, how):
    folder, out = tmp_path / "slides", tmp_path / "out"
    folder.mkdir()
    first = write(folder / "a.tiff", tissue_picture(640, 512, 1), 0.5)
    how(first, folder / "b.tiff")
    write(folder / "c.tiff", tissue_picture(640, 512, 2), 0.5)
    for done in (2, 0):
        assert encode(folder, "--out", out) == 0
        assert f"{done} done, {3 - done} skipped, 0 failed" in capsys.readouterr().out
        found = rows(out)
        assert (found["b.tiff"]["status"], found["b.tiff"]["reason"]) == ("skipped", f"same slide as {first}")
        assert found["b.tiff"]["patches"] == "0"
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["a.safetensors", "c.safetensors"]


def test_two_slides_of_one_quickhash_are_both_encoded_and_the_summary_says_so(tmp_path):
    """openslide's quickhash is that of the smallest level."""
    small = tissue_picture(320, 256, 9)
    first = write_pyramid(tmp_path / "a.tiff", tissue_picture(640, 512, 1), small)
    second = write_pyramid(tmp_path / "b.tiff", tissue_picture(640, 512, 2), small)
    with OpenSlide(first) as one, OpenSlide(second) as other:
        assert one.properties["openslide.quickhash-1"] == other.properties["openslide.quickhash-1"]
    assert encode(first, second, "--out", tmp_path / "out") == 0
    found = rows(tmp_path / "out")
    assert [found[name]["status"] for name in ("a.tiff", "b.tiff")] == ["done", "done"]
    assert found["a.tiff"]["warning"] == ""
    assert f"has the quickhash of {first} but other bytes" in found["b.tiff"]["warning"]


def test_the_files_of_one_dicom_series_are_one_slide_though_their_bytes_differ(tmp_path):
    """openslide opens a series by any of its files and gives all of them the quickhash of the series."""
    files = [tmp_path / f"{i}.dcm" for i in range(3)]
    for file in files:
        file.write_text(file.name)
    series = [SlideKey("dicom", "one"), SlideKey("dicom", "one"), SlideKey("dicom", "two")]
    assert [same.as_slide for same in find_same(files, series)] == [None, files[0], None]
    others = [SlideKey("aperio", "one"), SlideKey("aperio", "one"), None]
    assert [same.as_slide for same in find_same(files, others)] == [None, None, None]


@pytest.mark.parametrize("data", ["same", "other"])
def test_a_mirax_slide_is_what_lies_in_its_folder(tmp_path, data):
    slides = [tmp_path / "a.mrxs", tmp_path / "b.mrxs"]
    for slide, text in zip(slides, ("same", data), strict=True):
        slide.write_text("the same thumbnail")
        slide.with_suffix("").mkdir()
        (slide.with_suffix("") / "Slidedat.ini").write_text(text)
    found = find_same(slides, [SlideKey("mirax", "x")] * 2)[1]
    assert (found.as_slide == slides[0]) == (data == "same")
    assert bool(found.note) == (data == "other")


def test_what_lies_in_the_folder_of_a_mirax_slide_is_no_slide(tmp_path):
    (tmp_path / "deep/a").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    for name in ("deep/a.mrxs", "deep/a/inner.tif", "a/b.tif"):
        (tmp_path / name).write_bytes(b"")
    jobs = find_jobs([tmp_path], tmp_path / "out")
    assert [job.slide.relative_to(tmp_path).as_posix() for job in jobs] == ["a/b.tif", "deep/a.mrxs"]


def test_files_that_cannot_be_read_are_no_slide_of_each_other(tmp_path):
    os.mkfifo(tmp_path / "pipe.svs")
    paths = [tmp_path / "nosuch.svs", tmp_path / "neither.svs", tmp_path / "pipe.svs", tmp_path]
    keys = [slide_key(path) for path in paths]
    assert keys == [None] * 4
    assert not any(same.as_slide or same.note for same in find_same(paths, keys))
