"""`encode` where feature files are there already: which are left, which are made anew, which are refused."""

import csv
import json
import os
from pathlib import Path

import pytest

from vllm_wsi.cli.app import main
from vllm_wsi.encoding import encode_slide as encoding
from vllm_wsi.encoding.colour_texture import ColourTexture
from vllm_wsi.encoding.encode_slide import EncodeSettings, encode_slide
from vllm_wsi.errors import SlideError
from vllm_wsi.slides import open_features, write_features

from .slide_images import tissue_picture, write_tiff


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """640 x 512 px, which says 0.5 um a pixel."""
    return write_tiff(tmp_path / "a.tiff", tissue_picture(640, 512), 0.5)


def encoded(slide: Path, *options: str) -> tuple[str, int, str]:
    """(status, patches, reason) of the summary."""
    out = slide.parent / "out"
    arguments = ["--encoder", "colour-texture", "--patch-px", "64", *options]
    main(["encode", str(slide), "--out", str(out), *arguments])
    with open(out / "encode_summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    return row["status"], int(row["patches"]), row["reason"]


def facts(slide: Path) -> dict[str, str]:
    with open_features(slide.parent / "out/a.safetensors") as file:
        return dict(file.metadata)


def test_features_say_which_slide_in_which_state_they_were_made_of(slide: Path):
    encoded(slide)
    stat, said = slide.stat(), facts(slide)
    wanted = {"name": "a.tiff", "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "content": ""}
    assert json.loads(said["encoded_from"]) == wanted
    assert (said["mpp"], said["mpp_source"]) == ("0.5", "slide")


def test_features_of_another_mpp_than_the_given_one_are_refused(slide: Path):
    assert encoded(slide) == ("done", 20, "")
    out = slide.parent / "out/a.safetensors"
    said = f"{out}: mpp: found '0.5', wanted '0.25'; choose another --out"
    assert encoded(slide, "--mpp", "0.25") == ("failed", 0, said)
    assert encoded(slide, "--mpp", "0.5") == ("skipped", 20, "is there already")


def test_features_of_a_given_mpp_are_refused_where_none_is_given(slide: Path):
    assert encoded(slide, "--mpp", "0.25")[0] == "done"
    assert (facts(slide)["mpp"], facts(slide)["mpp_source"]) == ("0.25", "given")
    assert encoded(slide, "--mpp", "0.25")[0] == "skipped"
    out = slide.parent / "out/a.safetensors"
    said = f"{out}: mpp: found '0.25', given by --mpp, wanted the slide's own; choose another --out"
    assert encoded(slide) == ("failed", 0, said)


def test_a_slide_that_was_replaced_under_its_name_is_encoded_anew(slide: Path):
    assert encoded(slide) == ("done", 20, "")
    assert encoded(slide) == ("skipped", 20, "is there already")
    write_tiff(slide, tissue_picture(896, 512), 0.5)
    status, patches, reason = encoded(slide)
    assert (status, reason) == ("done", "encoded anew: the slide has changed since")
    assert patches > 20
    assert facts(slide)["width"] == "896"
    assert encoded(slide) == ("skipped", patches, "is there already")


def test_another_mtime_alone_makes_another_state(slide: Path):
    encoded(slide)
    os.utime(slide, ns=(0, slide.stat().st_mtime_ns + 1))
    assert encoded(slide) == ("done", 20, "encoded anew: the slide has changed since")


def without_source(slide: Path, **changes: str) -> None:
    """Writes the features that are there again, without the state of their slide."""
    out = slide.parent / "out/a.safetensors"
    with open_features(out) as file:
        rows, coords, metadata = file.read_rows(0, file.num_patches), file.read_coords(), dict(file.metadata)
    del metadata["encoded_from"]
    write_features(out, rows, coords, metadata | changes)


def test_features_that_do_not_say_the_state_of_their_slide_are_made_anew(slide: Path):
    encoded(slide)
    without_source(slide)
    said = "encoded anew: the file there did not say in which state its slide was"
    assert encoded(slide) == ("done", 20, said)
    assert encoded(slide) == ("skipped", 20, "is there already")


def test_features_that_something_else_made_are_refused_whatever_they_say_of_their_slide(slide: Path):
    encoded(slide)
    without_source(slide, encoder="uni2")
    out = slide.parent / "out/a.safetensors"
    said = f"{out}: encoder: found 'uni2', wanted 'colour-texture@1'; choose another --out"
    assert encoded(slide) == ("failed", 0, said)


def test_a_slide_that_changes_while_it_is_encoded_leaves_nothing(slide: Path, monkeypatch):
    batches = encoding._batches

    def touch(*arguments):
        os.utime(slide, ns=(0, 0))
        yield from batches(*arguments)

    monkeypatch.setattr(encoding, "_batches", touch)
    out = slide.parent / "out"
    with pytest.raises(SlideError, match=r"a\.tiff: found a file that changed while it was read"):
        encode_slide(slide, out / "a.safetensors", ColourTexture(), EncodeSettings(patch_px=64))
    assert not out.exists()
