"""EfficientNet-Lite0 with its real weights: that it sees what it was trained to see, and what exactly is a feature."""

import numpy as np
import pytest
import torch
from skimage import data
from torch.nn import functional

from vllm_wsi.cli.app import main
from vllm_wsi.encoding.efficientnet_lite0 import PATCH, SameConv, efficientnet_lite0, load_efficientnet_lite0, prepare
from vllm_wsi.encoding.encode_slide import EncodeSettings, encode_slide
from vllm_wsi.encoding.encoders import load_encoder
from vllm_wsi.encoding.image import open_image, read_scaled
from vllm_wsi.errors import EncoderError, SetupError
from vllm_wsi.parts.fetch import EFFICIENTNET_LITE0, fetch_file
from vllm_wsi.slides import open_features
from vllm_wsi.slides.encoder_names import compare_encoders

from .slide_images import tissue_picture, write_tiff

ID = "efficientnet-lite0@sha256-579344248a93-112px"


@pytest.fixture(scope="module")
def weights():
    try:
        return fetch_file(EFFICIENTNET_LITE0)
    except SetupError as error:
        pytest.skip(f"the weights are not to be had here: {error}")


@pytest.fixture(scope="module")
def encoder(weights):
    return load_encoder("efficientnet-lite0", "cpu")


@pytest.fixture(scope="module")
def tissue_patches():
    """[32, 50, 50, 3] of scikit-image's photograph of stained colon."""
    picture = data.immunohistochemistry()
    return np.stack([picture[i * 14 : i * 14 + 50, i * 14 : i * 14 + 50] for i in range(32)])


def square(picture: np.ndarray, edge: int) -> np.ndarray:
    """The middle of a photograph at another size."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = torch.tensor(picture[top : top + side, left : left + side]).permute(2, 0, 1)[None].float()
    scaled = functional.interpolate(pixels, (edge, edge), mode="bicubic", antialias=True).clamp(0, 255)
    return scaled.round().to(torch.uint8).movedim(1, 3).numpy()


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [("coffee", {967}), ("chelsea", {281, 282, 285}), ("rocket", {657})],  # espresso; tabby, tiger, Egyptian; missile
)
def test_photographs_are_what_imagenet_calls_them(weights, photograph, classes):
    model = load_efficientnet_lite0(weights)
    with torch.inference_mode():
        logits = model.classify(prepare(square(getattr(data, photograph)(), 224), 224))
    best = logits[0].topk(len(classes)).indices.tolist()
    assert set(best) == classes
    assert logits.softmax(1)[0, best].sum() > 0.2


def test_folding_the_batch_norms_changes_no_feature_beyond_rounding(weights, tissue_patches):
    pixels = prepare(tissue_patches)
    with torch.inference_mode():
        folded, plain = (load_efficientnet_lite0(weights, fold=fold)(pixels) for fold in (True, False))
    assert (folded - plain).abs().max() < 1e-4 * plain.abs().max()


def test_a_feature_is_the_mean_of_the_last_channels_of_the_patch_at_112_pixels(weights, encoder, tissue_patches):
    pixels = torch.from_numpy(tissue_patches).permute(0, 3, 1, 2).float()
    pixels = functional.interpolate(pixels, (112, 112), mode="bilinear", align_corners=False, antialias=False)
    model, seen = load_efficientnet_lite0(weights, fold=False), []
    model._bn1.register_forward_hook(lambda module, given, out: seen.append(out.clamp(0, 6)))
    with torch.inference_mode():
        model((pixels - 127) / 128)
    wanted = seen[0].flatten(2).mean(2).numpy()
    found = encoder.encode(tissue_patches)
    assert found.shape == (32, 1280)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-4 * wanted.max()
    assert wanted.std(axis=0).max() > 0.1  # patches differ at all


def test_a_patchs_feature_does_not_depend_on_its_batch(encoder, tissue_patches):
    together = encoder.encode(tissue_patches)
    alone = np.concatenate([encoder.encode(patch[None]) for patch in tissue_patches[:5]])
    assert np.abs(together[:5] - alone).max() < 1e-4 * np.abs(alone).max()


@pytest.mark.parametrize(("size", "kernel"), [(1, 3), (2, 3), (7, 3), (8, 3), (7, 5), (8, 5), (14, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_tensorflows_same_padding(size, kernel, stride):
    """TensorFlow's rule: ceil(size / stride) places; the first window begins floor(total / 2) before the picture."""
    conv = SameConv(1, 1, kernel, stride)
    count = -(-size // stride)
    before = max((count - 1) * stride + kernel - size, 0) // 2
    pixels = torch.arange(1.0, size * size + 1).reshape(1, 1, size, size)
    for place in range(kernel):  # a window that sees one place alone shows where it lies
        with torch.no_grad():
            conv.weight.zero_()
            conv.weight[0, 0, place, place] = 1
            found = conv(pixels)
        assert found.shape == (1, 1, count, count)
        at = [i * stride - before + place for i in range(count)]
        assert [found[0, 0, i, i].item() for i in range(count)] == [
            pixels[0, 0, k, k].item() if 0 <= k < size else 0 for k in at
        ]


def test_the_id_names_weights_and_input_size(encoder):
    assert encoder.id == ID
    assert (encoder.feature_dim, encoder.input_px, encoder.patch) == (1280, 112, (50, 4.0))
    assert compare_encoders(ID, ID).match == "same"
    for other in (ID.replace("112px", "224px"), ID.replace("57", "58")):
        assert compare_encoders(ID, other).match == "different"


def test_other_weights_are_refused(tmp_path):
    for name, content in (("other.pth", {"weight": torch.ones(2)}), ("object.pth", {"weight": PATCH})):
        torch.save(content, tmp_path / name)
        with pytest.raises(EncoderError, match=rf"{name}: found no weights that load \(.+\), wanted those of eff"):
            efficientnet_lite0(tmp_path / name, "0" * 64)


def test_a_slide_is_encoded_as_patches_of_200_microns_at_4_microns_a_pixel(encoder, tmp_path):
    path = write_tiff(tmp_path / "a.tiff", np.kron(tissue_picture(450, 400), np.ones((8, 8, 1), np.uint8)), 0.5)
    result = encode_slide(path, tmp_path / "a.safetensors", encoder, EncodeSettings())
    assert result.warnings == ()
    with open_features(tmp_path / "a.safetensors") as slide, open_image(path) as image:
        said = {"patch_size": "50", "patch_mpp": "4", "patch_size_level0": "400", "encoder": ID}
        assert said.items() <= dict(slide.metadata).items()
        coords, rows = slide.read_coords(), slide.read_rows(0, slide.num_patches)
        x, y = coords[-1].tolist()
        patch = read_scaled(image, "a", x, y, 400, 400, (50, 50))
    wanted = encoder.encode(patch[None])[0]
    assert np.abs(rows[-1].astype(np.float32) - wanted).max() < 2e-3 * wanted.max()  # float16


def test_patches_of_another_scale_are_encoded_and_that_is_said(encoder, tmp_path, capsys):
    write_tiff(tmp_path / "a.tiff", tissue_picture(1024, 768), 0.5)
    options = ["--encoder", "efficientnet-lite0", "--patch-px", "224", "--patch-mpp", "0.5"]
    assert main(["encode", str(tmp_path / "a.tiff"), "--out", str(tmp_path / "out"), *options]) == 0
    said = f"patches of 224 px at 0.5 um, and not of 50 px at 4 um, as checkpoints of {ID} expect them"
    assert said in capsys.readouterr().err
