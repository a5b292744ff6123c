"""Patch encoders by name: what is loaded, what is recorded of it, and that it sees what it was trained to see."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTModel

from vllm_wsi.encoding.colour_texture import FEATURE_DIM, ColourTexture
from vllm_wsi.encoding.encode_slide import EncodeSettings, encode_slide
from vllm_wsi.encoding.encoders import load_encoder
from vllm_wsi.errors import SlideError
from vllm_wsi.slides import open_features

from .slide_images import tissue_picture, write_tiff

PATCHES = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
MEAN, STD = (0.7, 0.6, 0.7), (0.15, 0.2, 0.15)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A transformers vision model of random weights on disk."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "tiny-vit"
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = ViTModel(config).eval()
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(f'{{"image_mean": {list(MEAN)}, "image_std": {list(STD)}}}')
    return path, model


@pytest.mark.parametrize("edge", [8, 9, 64, 224])
def test_colour_texture_gives_64_finite_numbers_for_any_patch(edge):
    extremes = [np.zeros((edge, edge, 3)), np.full((edge, edge, 3), 255), PATCHES[0].repeat(4, 0).repeat(4, 1)]
    patches = np.stack([x[:edge, :edge] for x in extremes]).astype(np.uint8)
    features = ColourTexture().encode(patches)
    assert features.shape == (3, FEATURE_DIM)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert np.abs(features).max() < 100  # far from float16's end


def test_a_patchs_features_do_not_depend_on_its_batch():
    together = ColourTexture().encode(PATCHES)
    assert np.array_equal(together, np.concatenate([ColourTexture().encode(patch[None]) for patch in PATCHES]))


def test_a_transformers_model_on_disk_encodes_as_transformers_itself_does(vit):
    path, model = vit
    encoder = load_encoder(str(path), "cpu")
    edge = PATCHES[:, :32, :32]
    pixels = torch.from_numpy(edge).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        wanted = model(pixel_values=pixels).pooler_output.numpy()
    assert (encoder.feature_dim, encoder.input_px) == (32, 32)
    assert np.allclose(encoder.encode(edge), wanted, atol=1e-5)


def test_a_larger_patch_is_scaled_to_what_the_model_takes(vit):
    encoder = load_encoder(str(vit[0]), "cpu")
    flat = np.full((1, 100, 100, 3), 90, np.uint8)
    assert np.allclose(encoder.encode(flat), encoder.encode(flat[:, :32, :32]), atol=1e-5)


def test_the_weights_themselves_are_the_revision(vit, tmp_path):
    first = load_encoder(str(vit[0]), "cpu").id
    assert first.startswith("tiny-vit@sha256-")
    torch.manual_seed(1)
    path = tmp_path / "tiny-vit"
    ViTModel(vit[1].config).save_pretrained(path)
    assert load_encoder(str(path), "cpu").id != first


def test_a_slide_is_encoded_by_a_model_on_disk(vit, tmp_path):
    path = write_tiff(tmp_path / "a.tiff", tissue_picture(640, 512))
    encoder = load_encoder(str(vit[0]), "cpu")
    encode_slide(path, tmp_path / "a.safetensors", encoder, EncodeSettings(patch_px=64, batch_size=3))
    with open_features(tmp_path / "a.safetensors") as slide:
        assert slide.feature_dim == 32
        assert slide.metadata["encoder"] == encoder.id


def test_weights_in_a_pickle_are_refused(vit, tmp_path):
    (tmp_path / "config.json").write_text((vit[0] / "config.json").read_text())
    torch.save(vit[1].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SlideError, match=r"found no \.safetensors, wanted the model's weights"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "sentence"), [(None, "no readable config"), ("{", "no readable"), ("{}", "neither")]
)
def test_a_directory_that_holds_no_model_is_refused(tmp_path, config, sentence):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SlideError, match=sentence):
        load_encoder(str(tmp_path))


HUB_CODE = """
import sys
from vllm_wsi.errors import SlideError
from vllm_wsi.encoding.encoders import load_encoder
try:
    load_encoder(sys.argv[1], "cpu")
except SlideError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["nosuch-encoder", "hf-hub:nosuch-owner-7261/nosuch-model"])
def test_an_encoder_that_is_not_to_be_had_is_one_sentence(name, tmp_path):
    """In a process of its own, without a network: the hub's client and the zoo each have their own way to fail."""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", HUB_CODE, name], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("encoder")
    assert "wanted" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


# A machine without a GPU may lack a torchvision that fits its torch, and timm imports it. For this one test the wheel
# is unpacked beside the environment; of it nothing but Python code is used.
TIMM_CODE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
try:
    import torchvision
except Exception:
    for module in [m for m in sys.modules if m.startswith("torchvision")]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import json, timm, numpy as np
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from vllm_wsi.encoding.encoders import load_encoder
path = Path(sys.argv[2])
torch.manual_seed(0)
model = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
save_file(model.state_dict(), path / "model.safetensors")
settings = {"mean": [0.7, 0.6, 0.7], "std": [0.1, 0.2, 0.1], "input_size": [3, 160, 160], "crop_pct": 0.95,
            "interpolation": "bicubic", "num_classes": 0}
(path / "config.json").write_text(json.dumps(
    {"architecture": "test_vit", "num_classes": 0, "num_features": 64, "pretrained_cfg": settings}))
patches = np.random.default_rng(0).integers(0, 255, (3, 168, 168, 3), dtype=np.uint8)
encoder = load_encoder(str(path), "cpu")
loaded = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded), is_training=False)
with torch.no_grad():
    wanted = loaded(torch.stack([transform(Image.fromarray(p)) for p in patches])).numpy()
found = encoder.encode(patches)
print(json.dumps([encoder.id.split("@")[1][:7], encoder.feature_dim, encoder.input_px,
                  float(np.abs(found - wanted).max()), float(np.abs(wanted).max())]))
"""


def test_a_timm_model_on_disk_encodes_as_timm_itself_does(tmp_path):
    import json

    site, path = tmp_path / "site", tmp_path / "model"
    path.mkdir()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), "torchvision==0.28.0"]
    if subprocess.run(command, capture_output=True, timeout=300).returncode:
        pytest.skip("timm needs torchvision, and its wheel is not to be had here")
    done = subprocess.run([sys.executable, "-c", TIMM_CODE, str(site), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    revision, dim, edge, difference, largest = json.loads(done.stdout.splitlines()[-1])
    assert (revision, dim, edge) == ("sha256-", 64, 160)
    assert difference < 0.02 * largest
