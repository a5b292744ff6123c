"""The slides of `vllm-wsi demo`: a virtual slide, a photograph of tissue, or one of the user's."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_wsi.errors import needs_extra
from vllm_wsi.haystack.generator import HaystackSlide, HaystackWorld
from vllm_wsi.slides import SlideIdentity, open_features
from vllm_wsi.slides.encoder_names import Mismatch
from vllm_wsi.slides.formats.dispatch import is_image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BUILT_IN = "colour-texture"
VIRTUAL_PATCHES = 100_000
VIRTUAL_SLIDE = 0  # number of the slide in haystack's test split
QUESTION = "What does this slide show?"
SECOND_QUESTION = "Which finding supports this?"
PHOTOGRAPH_MPP = 0.5  # it says none; this number only sets the scale of a demo
PHOTOGRAPH_PATCH_PX = 32
UNFAMILIAR = "trained on virtual slides alone: its answer about tissue means nothing, the path is real"


class Progress:
    """One line that lives while something takes long."""

    def __init__(self, what: str) -> None:
        self._what, self._began, self._live = what, time.monotonic(), sys.stderr.isatty()
        print(f"{what} ...", end="" if self._live else "\n", file=sys.stderr, flush=True)

    def tick(self, seconds: float) -> None:
        if self._live:
            print(f"\r{self._what} ... {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        start = f"\r{self._what} ... " if self._live else "  "
        print(f"{start}done in {time.monotonic() - self._began:.1f} s", file=sys.stderr, flush=True)


@dataclass
class DemoSlide:
    """A slide to ask about."""

    features: Path
    image: Path | None = None
    virtual: HaystackSlide | None = None  # whose right answers are known
    questions: tuple[str, str] = (QUESTION, SECOND_QUESTION)
    note: str = ""
    encoder_mismatch: Mismatch = "refuse"
    facts: str = field(init=False)
    num_patches: int = field(init=False)
    feature_dim: int = field(init=False)
    metadata: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        with open_features(self.features) as opened:
            self.facts = f"{opened.num_patches:,} patches x {opened.feature_dim}, {opened.dtype}, {opened.format}"
            self.num_patches, self.feature_dim = opened.num_patches, opened.feature_dim
            self.metadata = opened.metadata


@dataclass
class Scene:
    """Slides that one server is asked about."""

    checkpoint: Path
    model: str  # as the demo calls it
    slides: list[DemoSlide]
    about: tuple[str, ...] = ()  # lines on what the model was trained on
    server_args: tuple[str, ...] = ()


def users_slide(path: Path, encoder: str, work: Path) -> DemoSlide:
    """A slide of the user's.

    Args:
        path: feature file or slide image.
        encoder: of a slide image.
        work: folder for its features.
    """
    return encoded(path.resolve(), encoder, work) if _is_image(path) else DemoSlide(path.resolve())


def photograph(work: Path) -> DemoSlide:
    """The photograph of tissue, by the built-in encoder; the model of virtual slides can make nothing of it."""
    slide = encoded(write_photograph(work), BUILT_IN, work, patch_px=PHOTOGRAPH_PATCH_PX, tissue="none")
    slide.note = UNFAMILIAR
    return slide


def _is_image(path: Path) -> bool:
    if SlideIdentity.of_file(path).content:  # a zarr store is a directory
        return False
    with open(path, "rb") as file:
        return is_image(path, file.read(64))


def write_photograph(folder: Path) -> Path:
    """scikit-image's photograph of stained colon (FHL2 by DAB, and haematoxylin) as a slide image of 512 x 512."""
    with needs_extra("slides"):
        from skimage import data

    return write_slide_image(folder / "immunohistochemistry.tiff", data.immunohistochemistry(), PHOTOGRAPH_MPP)


def write_slide_image(path: Path, pixels: NDArray[np.uint8], mpp: float) -> Path:
    """RGB pixels [h, w, 3] as a tiled TIFF that says its scale, microns per pixel."""
    with needs_extra("slides"):
        import tifffile

    per_cm = 1e4 / mpp
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(256, 256), photometric="rgb", resolution=(per_cm, per_cm), resolutionunit="CENTIMETER")
    return path


def encoded(image: Path, encoder_name: str, work: Path, **settings: Any) -> DemoSlide:
    """A slide image with its features, which are written to `work`; `settings` are those of `encode`."""
    with needs_extra("slides"):
        from vllm_wsi.encoding.encode_slide import EncodeSettings, encode_slide
        from vllm_wsi.encoding.encoders import load_encoder

    encoder = load_encoder(encoder_name)
    progress = Progress(f"encoding {image.name} with {encoder_name}")
    features = work / f"{image.stem}.safetensors"
    encode_slide(image, features, encoder, EncodeSettings(**settings))
    progress.done()
    return DemoSlide(features, image)


def virtual_slide(work: Path) -> DemoSlide:
    progress = Progress(f"making a virtual slide of {VIRTUAL_PATCHES:,} patches")
    virtual = HaystackWorld().slide("test", VIRTUAL_SLIDE, VIRTUAL_PATCHES)
    features = virtual.write(work / f"{virtual.name}.safetensors")
    progress.done()
    return DemoSlide(features, virtual=virtual, questions=(virtual.question(0), virtual.question(1)))
