"""Patches that overlap: the grid, what the file says of it, and that nobody takes the step for the patch's edge."""

import numpy as np
import pytest

from vllm_wsi.cli.app import main
from vllm_wsi.encoding.colour_texture import ColourTexture
from vllm_wsi.encoding.encode_slide import EncodeSettings, encode_slide
from vllm_wsi.encoding.image import open_image
from vllm_wsi.encoding.patches import FEW_PATCHES, Tiling, find_patches
from vllm_wsi.errors import SettingsError
from vllm_wsi.slides import open_features
from vllm_wsi.slides.regions import level0_rects, patch_size

from .slide_images import tissue_picture, write_tiff


@pytest.fixture
def image(tmp_path):
    return write_tiff(tmp_path / "a.tiff", tissue_picture(1024, 768), 0.5)


def tissue_px(found: Tiling) -> float:
    """Level-0 pixels of the tissue."""
    return found.tissue.mask.sum() * np.prod(found.overview.scale)


@pytest.mark.parametrize("step", [1, 7, 63, 64])
def test_a_grid_has_every_step_that_leaves_a_whole_patch(image, step):
    with open_image(write_tiff(image.with_name("b.tiff"), tissue_picture(130, 100))) as opened:
        corners = find_patches(opened, "b", 0.5, 64, "none", step_px=step).corners
    columns, rows = range(0, 130 - 64 + 1, step), range(0, 100 - 64 + 1, step)
    assert corners.tolist() == [[x, y] for y in rows for x in columns]


def test_overlapping_patches_are_the_same_tissue_seen_more_often(image):
    with open_image(image) as opened:
        apart = find_patches(opened, "a", 0.5, 64).corners
        closer = find_patches(opened, "a", 0.5, 64, step_px=32).corners
    assert set(map(tuple, apart.tolist())) < set(map(tuple, closer.tolist()))
    assert 3 * len(apart) < len(closer) < 5 * len(apart)
    inside = (closer + 0.35 * 64 >= [256 - 64, 192 - 64]) & (closer + 64 <= [768 + 64, 576 + 64])
    assert inside.all()  # on the tissue, which lies in the middle half


def test_few_patches_are_told_by_the_area_that_they_cover_and_not_by_their_number(tmp_path):
    picture = np.full((1024, 1024, 3), 243, np.uint8)
    picture[600:760, 600:760] = (190, 80, 160)
    for k in range(60):  # crumbs of which hardly one fills a patch
        y, x = 20 + k // 12 * 120, 20 + k % 12 * 80
        picture[y : y + 60, x : x + 60] = (190, 80, 160)
    with open_image(write_tiff(tmp_path / "crumbs.tiff", picture)) as opened:
        found = find_patches(opened, "a", 0.5, 128, step_px=16)
    assert len(found.corners) * 128**2 > tissue_px(found)
    assert any(warning.startswith("patches cover 23% of the tissue") for warning in found.warnings)
    with open_image(write_tiff(tmp_path / "a.tiff", tissue_picture(1024, 768))) as opened:
        found = find_patches(opened, "a", 0.5, 300, step_px=30)
    assert len(found.corners) * 30**2 < FEW_PATCHES * tissue_px(found)
    assert not any("patches cover" in warning for warning in found.warnings)


@pytest.mark.parametrize(("mpp", "edge", "step"), [(0.5, 64, 16), (0.25, 128, 32), (0.3, 107, 27)])
def test_the_file_says_edge_and_step_and_its_patches_have_the_edge(tmp_path, mpp, edge, step):
    path = write_tiff(tmp_path / "a.tiff", tissue_picture(1024, 768), mpp)
    encode_slide(path, tmp_path / "a.safetensors", ColourTexture(), EncodeSettings(patch_px=64, step_px=16))
    with open_features(tmp_path / "a.safetensors") as slide:
        assert {"patch_size": "64", "step_size": "16", "patch_size_level0": str(edge)}.items() <= slide.metadata.items()
        coords = slide.read_coords()
        size = patch_size(slide.metadata, coords, slide.unit)
    assert np.diff(np.unique(coords[:, 0])).min() == step
    assert (size.value, size.source) == (edge, "file")
    assert (level0_rects("a", coords, "px", size, {})[:, 2:] == edge).all()


def test_a_file_of_another_step_is_not_taken_for_finished(image, tmp_path, capsys):
    command = ["encode", str(image), "--encoder", "colour-texture", "--out", str(tmp_path / "out"), "--patch-px", "128"]
    assert main([*command, "--step", "64"]) == 0
    assert "step_size" not in capsys.readouterr().err
    assert main(command) == 1
    assert "step_size: found '64', wanted '128'; choose another --out" in capsys.readouterr().err
    assert main([*command, "--step", "64"]) == 0
    assert "is there already" in capsys.readouterr().out


def test_a_step_beyond_the_patch_is_refused(image, tmp_path, capsys):
    """It would leave tissue out between the patches."""
    command = ["encode", str(image), "--encoder", "colour-texture", "--out", str(tmp_path / "out")]
    for options in (["--patch-px", "64", "--step", "65"], ["--step", "225"]):
        assert main([*command, *options]) == 1
        assert "step_px: found" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="step_px: found 0, wanted at least 1"):
        EncodeSettings(step_px=0)
