"""Pictures of other channels than red, green and blue: refused by name, or encoded as the user says."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from vllm_wsi.cli.app import main
from vllm_wsi.encoding.image import open_image
from vllm_wsi.errors import SlideError
from vllm_wsi.slides import open_features

from .slide_images import tissue_picture, write_ome_tiff, write_tiff

NAMES = ["DAPI", "CD8", "CD3", "PanCK"]


def cells(channels: int, dtype="uint8", side=640) -> np.ndarray:
    """[c, h, w] grey planes, each with bright cells of its own on black."""
    rng = np.random.default_rng(0)
    planes = np.zeros((channels, side, side), dtype)
    for plane in planes:
        for x, y in rng.integers(60, side - 80, (400, 2)):
            plane[y : y + 14, x : x + 14] = rng.integers(90, 255)
    return planes


def write_channels(path: Path, planes: np.ndarray, names=None, photometric="minisblack", **more) -> Path:
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    if names is not None:
        metadata["Channel"] = {"Name": list(names)}
    tifffile.imwrite(
        path, planes, ome=True, photometric=photometric, tile=(256, 256), compression="zlib", metadata=metadata, **more
    )
    return path


def encode(*arguments: object) -> int:
    return main(["encode", *map(str, arguments), "--encoder", "colour-texture", "--patch-px", "64"])


@pytest.mark.parametrize(
    ("planes", "names", "sentence"),
    [
        (cells(4), NAMES, "found 4 channels DAPI, CD8, CD3, PanCK, wanted 8-bit RGB; --channels says which three"),
        (cells(3), NAMES[:3], "found 3 channels DAPI, CD8, CD3, wanted 8-bit RGB; --channels says which three"),
        (cells(3), None, "found 3 channels 0, 1, 2, wanted 8-bit RGB; --channels says which three"),
        (cells(2), NAMES[:2], "found 2 channels DAPI, CD8, wanted 8-bit RGB"),
        (cells(1)[0], None, "found 1 channel 0, wanted 8-bit RGB"),
        (cells(4, "uint16"), NAMES, "found 4 channels DAPI, CD8, CD3, PanCK of uint16, wanted 8-bit RGB; how far"),
        (cells(14, side=300), [f"marker{i}" for i in range(14)], "marker10, marker11, ..., wanted 8-bit RGB"),
    ],
)
def test_channels_are_refused_by_their_names_and_nothing_is_written(tmp_path, capsys, planes, names, sentence):
    if planes.ndim == 2:
        path = tmp_path / "a.ome.tif"
        tifffile.imwrite(path, planes, ome=True, tile=(256, 256), metadata={"axes": "YX", "PhysicalSizeX": 0.5})
    else:
        path = write_channels(tmp_path / "a.ome.tif", planes, names)
    assert encode(path, "--out", tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert f"{path}: found" in printed
    assert sentence in printed
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["encode_summary.csv"]


def test_the_channels_that_are_asked_for_are_encoded_in_their_order(tmp_path):
    planes = cells(4)
    path = write_channels(tmp_path / "a.ome.tif", planes, NAMES)
    for wanted in (("PanCK", "dapi", "2"), ("3", "0", "CD3")):
        with open_image(path, wanted) as image:
            region = np.asarray(image.read_region((100, 120), 0, (300, 200)))
            assert np.array_equal(region[..., :3], np.moveaxis(planes[[3, 0, 2], 120:320, 100:400], 0, 2))
    assert encode(path, "--out", tmp_path / "out", "--channels", "PanCK,DAPI,CD3") == 0
    with open_features(tmp_path / "out" / "a.ome.safetensors") as slide:
        assert slide.metadata["channels"] == "PanCK,DAPI,CD3"
        assert slide.num_patches > 20
    assert encode(path, "--out", tmp_path / "out", "--channels", "DAPI,CD8,CD3") == 1  # made another way


@pytest.mark.parametrize(
    ("names", "wanted", "sentence"),
    [
        (NAMES, "DAPI,CD8", "found --channels with 2 of them, wanted three of DAPI, CD8, CD3, PanCK"),
        (
            NAMES,
            "DAPI,CD8,CD4",
            "found --channels 'CD4', wanted three of DAPI, CD8, CD3, PanCK, or numbers from 0 to 3",
        ),
        (NAMES, "0,1,4", "found --channels '4', wanted three of"),
        (NAMES, "0,1,-1", "found --channels '-1', wanted three of"),
        (["DAPI", "A", "a", "B"], "DAPI,A,B", "found --channels 'A', which 2 channels are called"),
    ],
)
def test_channels_that_are_not_there_are_refused(tmp_path, capsys, names, wanted, sentence):
    path = write_channels(tmp_path / "a.ome.tif", cells(4), names)
    assert encode(path, "--out", tmp_path / "out", "--channels", wanted) == 1
    assert f"{path}: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("Red", "Green", "Blue"), ("r", "g", "b")])
def test_three_planes_that_call_themselves_red_green_and_blue_are_a_picture(tmp_path, names):
    picture = tissue_picture(640, 512)
    path = write_channels(tmp_path / "a.ome.tif", np.ascontiguousarray(np.moveaxis(picture, 2, 0)), names)
    with open_image(path) as image:
        assert np.array_equal(np.asarray(image.read_region((0, 0), 0, (640, 512)))[..., :3], picture)


def test_planes_without_names_that_hold_a_stained_slide_are_encoded_as_one_when_asked_for(tmp_path):
    picture = tissue_picture(640, 512)
    planes = np.ascontiguousarray(np.moveaxis(picture, 2, 0))
    assert encode(write_channels(tmp_path / "a.ome.tif", planes), "--out", tmp_path, "--channels", "0,1,2") == 0
    assert encode(write_ome_tiff(tmp_path / "b.ome.tif", picture, 0.5, planar=True), "--out", tmp_path) == 0
    with open_features(tmp_path / "a.ome.safetensors") as a, open_features(tmp_path / "b.ome.safetensors") as b:
        assert np.array_equal(a.read_coords(), b.read_coords())
        assert np.array_equal(a.read_rows(0, a.num_patches), b.read_rows(0, b.num_patches))


@pytest.mark.parametrize("write", [write_tiff, write_ome_tiff])
def test_light_on_a_dark_ground_in_rgb_is_refused_unless_its_channels_are_named(tmp_path, capsys, write):
    picture = np.ascontiguousarray(np.moveaxis(cells(3), 0, 2))
    path = write(tmp_path / ("a.tif" if write is write_tiff else "a.ome.tif"), picture, 0.5)
    for options in ((), ("--tissue", "none")):
        assert encode(path, "--out", tmp_path / "out", *options) == 1
        assert f"{path}: found light on a dark ground, as of fluorescence" in capsys.readouterr().err
    assert encode(path, "--out", tmp_path / "out", "--channels", "2,1,0") == 1
    assert f"{path}: found --channels 2,1,0, wanted Red,Green,Blue, which this" in capsys.readouterr().err
    assert encode(path, "--out", tmp_path / "named", "--channels", "Red,Green,Blue") == 0


@pytest.mark.parametrize("suffix", [".tif", ".qptiff"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_flat_tiff_of_grey_pages_is_no_colour_picture_of_its_first(tmp_path, suffix, dtype):
    """openslide opens it, as a grey picture of the first channel alone."""
    path = tmp_path / f"a{suffix}"
    layout = {"tile": (256, 256), "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        for plane in cells(3, dtype):
            file.write(plane, photometric="minisblack", **layout)
    with pytest.raises(SlideError, match="wanted 8-bit RGB"):
        open_image(path)


def test_a_label_in_colour_is_not_taken_for_the_slide(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(cells(4), tile=(256, 256), metadata={"axes": "CYX", "Channel": {"Name": NAMES}})
        file.write(tissue_picture(320, 256), photometric="rgb", tile=(256, 256), metadata={"axes": "YXS"})
    with pytest.raises(SlideError, match="found 4 channels DAPI, CD8, CD3, PanCK"):
        open_image(path)


def test_a_photograph_in_jpeg_colour_stays_readable(tmp_path):
    """YCbCr is how most slides store red, green and blue."""
    picture = np.asarray(Image.fromarray(tissue_picture(640, 512)))
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="ycbcr", compression="jpeg", tile=(256, 256))
    with open_image(tmp_path / "a.tif") as image:
        assert image.dimensions == (640, 512)
