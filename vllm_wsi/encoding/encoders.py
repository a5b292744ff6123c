"""Patch encoders by name: the built-in one, lazyslide's zoo (UNI, CONCH, Virchow, GigaPath ...), timm, transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor

BUILT_IN = "colour-texture"
LITE = "efficientnet-lite0"
HUB = "hf-hub:"
HUB_SECONDS = 10  # to find out that no hub can be reached; its own client tries for a minute
DIGEST_CHARS = 12


class PatchScale(NamedTuple):
    """Patches as an encoder is to see them."""

    px: int  # edge in pixels
    mpp: float  # microns per pixel


USUAL_PATCH = PatchScale(224, 0.5)  # 20x, as most encoders of this field take them
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


class PatchEncoder(Protocol):
    """A frozen encoder of single patches."""

    id: str  # id@revision, as feature files record it
    feature_dim: int
    input_px: int | None  # edge of the patches that it was made for; None: any
    patch: PatchScale | None  # that it is used with in this project; None: any, by default `USUAL_PATCH`
    on_gpu: bool

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[n, d] of RGB patches [n, h, w, 3]."""
        ...


def load_encoder(name: str, device: str = "auto") -> PatchEncoder:
    """An encoder by its name.

    Args:
        name: "colour-texture" (built in, no weights); "efficientnet-lite0" (ImageNet weights, fetched once); a name in
            lazyslide's zoo ("uni2", "conch", "virchow2", "gigapath" ...); "hf-hub:OWNER/REPO" of that zoo or of any
            timm model; a directory with a timm or transformers vision model. No code of a repository is run.
        device: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises:
        EncoderError: there is no such encoder, or it cannot be loaded here.
        SetupError: weights that have to be fetched could not be.
    """
    if name == BUILT_IN:
        from .colour_texture import ColourTexture

        return ColourTexture()
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == LITE:
        from vllm_wsi.parts.fetch import EFFICIENTNET_LITE0, fetch_file

        from .efficientnet_lite0 import efficientnet_lite0

        return efficientnet_lite0(fetch_file(EFFICIENTNET_LITE0), EFFICIENTNET_LITE0.sha256, device)
    if Path(name).is_dir():
        return _from_directory(Path(name), device)
    if name.startswith(HUB):
        return _from_hub(name.removeprefix(HUB), device)
    return _from_zoo(name, device)


class TorchEncoder:
    """A vision model behind a transform; half precision on CUDA, fp32 elsewhere."""

    def __init__(
        self,
        identity: str,
        encode: Callable[[Tensor], Tensor],
        transform: Callable[[NDArray[np.uint8]], Tensor],
        device: str,
        input_px: int | None,
        patch: PatchScale | None = None,
    ) -> None:
        self.id, self.input_px, self.patch, self.on_gpu = identity, input_px, patch, device == "cuda"
        self._encode, self._transform, self._device = encode, transform, device
        edge = input_px or 224
        self.feature_dim = self.encode(np.zeros((1, edge, edge, 3), np.uint8)).shape[1]

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode(), torch.autocast(self._device, torch.float16, enabled=self.on_gpu):
            found = self._encode(self._transform(patches).to(self._device))
        if found.ndim != 2:
            raise EncoderError(f"encoder {self.id}: found an output of shape {tuple(found.shape)}, wanted [n, d]")
        return found.float().cpu().numpy()


def _from_zoo(name: str, device: str) -> TorchEncoder:
    models = _zoo()
    if name not in models.MODEL_REGISTRY:
        known = ", ".join(sorted({*models.list_models("vision"), *models.list_models("multimodal")}))
        raise EncoderError(
            f"encoder: found {name!r}, wanted {BUILT_IN}, {LITE}, hf-hub:OWNER/REPO, a directory, or one of {known}"
        )
    card = models.MODEL_REGISTRY[name]
    repo = str(getattr(card, "hf_url", None) or "").rstrip("/").split("huggingface.co/")[-1]
    if repo:
        _check_hub(repo, f"encoder {name}")
    try:
        model = card().to(device)
    except Exception as error:  # each model of the zoo raises what its own libraries raise
        raise EncoderError(
            f"encoder {name}: found none that loads here ({_line(error)}), wanted its weights"
        ) from error
    transform = model.get_transform()

    def prepare(patches: NDArray[np.uint8]) -> Tensor:
        import torch
        from PIL import Image

        return torch.stack([transform(Image.fromarray(patch)) for patch in patches])

    identity = f"{repo or name}@{_hub_revision(repo)}"
    return TorchEncoder(identity, model.encode_image, prepare, device, None)


def _from_hub(repo: str, device: str) -> TorchEncoder:
    models = _zoo()
    for name in (*models.list_models("vision"), *models.list_models("multimodal")):
        url = str(getattr(models.MODEL_REGISTRY[name], "hf_url", None) or "")
        if url.rstrip("/").lower().endswith(f"huggingface.co/{repo.lower()}"):
            return _from_zoo(name, device)
    _check_hub(repo, f"encoder {HUB}{repo}")
    return _timm(f"{HUB}{repo}", f"{repo}@{_hub_revision(repo)}", device)


def _from_directory(path: Path, device: str) -> TorchEncoder:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise EncoderError(f"encoder {path}: found no readable config.json ({error}), wanted a vision model") from error
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise EncoderError(f"encoder {path}: found no .safetensors, wanted the model's weights")
    digest = hashlib.sha256()
    for file in weights:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    identity = f"{path.resolve().name}@sha256-{digest.hexdigest()[:DIGEST_CHARS]}"
    if "architecture" in config:
        return _timm(f"local-dir:{path}", identity, device)
    if "model_type" in config:
        return _transformers(path, identity, device)
    raise EncoderError(
        f"encoder {path}: config.json: found neither 'architecture' nor 'model_type', "
        "wanted a timm or transformers model"
    )


def _timm(name: str, identity: str, device: str) -> TorchEncoder:
    try:
        import timm

        model = timm.create_model(name, pretrained=True, num_classes=0).eval().to(device)
    except Exception as error:  # timm raises whatever a repository makes it trip over
        raise EncoderError(f"encoder {name}: found no timm model that loads here ({_line(error)})") from error
    settings = timm.data.resolve_model_data_config(model)
    edge = settings["input_size"][1]
    prepare = _Prepare(edge, settings["crop_pct"], settings["mean"], settings["std"], settings["interpolation"])
    return TorchEncoder(identity, model, prepare, device, edge)


def _transformers(path: Path, identity: str, device: str) -> TorchEncoder:
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True).eval().to(device)
    except Exception as error:  # as above
        raise EncoderError(f"encoder {path}: found no transformers model that loads here ({_line(error)})") from error
    model = getattr(model, "vision_model", model)
    settings_file = path / "preprocessor_config.json"
    settings = IMAGENET | (json.loads(settings_file.read_text()) if settings_file.exists() else {})
    edge = model.config.image_size
    prepare = _Prepare(edge, 1.0, settings["image_mean"], settings["image_std"], "bicubic")

    def encode(pixels: Tensor) -> Tensor:
        out = model(pixel_values=pixels)
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    return TorchEncoder(identity, encode, prepare, device, edge)


class _Prepare:
    """Resize to edge / crop, centre crop, scale to 0 .. 1, normalise: timm's evaluation transform, on batches."""

    def __init__(self, edge: int, crop: float, mean: Any, std: Any, interpolation: str) -> None:
        import torch

        self._edge, self._resized = edge, int(edge / crop)
        self._mode = interpolation if interpolation in ("bilinear", "bicubic") else "bicubic"
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))

    def __call__(self, patches: NDArray[np.uint8]) -> Tensor:
        import torch
        from torch.nn import functional

        pixels = torch.from_numpy(np.ascontiguousarray(patches)).movedim(3, 1).float()
        if pixels.shape[2:] != (self._resized, self._resized):
            size = (self._resized, self._resized)
            pixels = functional.interpolate(pixels, size, mode=self._mode, antialias=True).clamp(0, 255)
        first = (self._resized - self._edge) // 2
        pixels = pixels[..., first : first + self._edge, first : first + self._edge] / 255
        return (pixels - self._mean) / self._std


def _zoo() -> Any:
    try:
        import lazyslide_models
    except Exception as error:  # an unfit torchvision raises a RuntimeError
        raise EncoderError(
            f"encoder: found no usable lazyslide-models and timm ({_line(error)}), wanted them for this encoder; "
            'pip install "vllm-wsi[slides]", and a torchvision that fits torch'
        ) from error
    return lazyslide_models


def _check_hub(repo: str, what: str) -> None:
    """Fails early: without a network the hub's own client tries for a minute."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, "config.json"), str):
        return
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(repo, timeout=HUB_SECONDS)
            return
        except Exception as error:  # of the network, of the hub, of access
            reason = _line(error)
    raise EncoderError(f"{what}: found neither a copy in the cache nor access to {repo} ({reason}), wanted its weights")


def _hub_revision(repo: str) -> str:
    """The commit that the cache holds; «unknown» where the files came another way."""
    from huggingface_hub import constants

    ref = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / "main"
    return ref.read_text().strip()[:DIGEST_CHARS] if ref.is_file() else "unknown"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
