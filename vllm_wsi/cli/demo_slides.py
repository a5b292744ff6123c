"""The slides of `vllm-wsi demo`: a photograph of tissue, a virtual slide, or one of the user's."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vllm_wsi.errors import needs_extra
from vllm_wsi.haystack.generator import HaystackSlide, HaystackWorld
from vllm_wsi.slides import SlideIdentity, open_features
from vllm_wsi.slides.encoder_names import Mismatch
from vllm_wsi.slides.formats.dispatch import is_image

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
    feature_dim: int = field(init=False)
    metadata: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        with open_features(self.features) as opened:
            self.facts = f"{opened.num_patches:,} patches x {opened.feature_dim}, {opened.dtype}, {opened.format}"
            self.feature_dim, self.metadata = opened.feature_dim, opened.metadata


def slides_to_show(slide: Path | None, encoder: str, work: Path) -> list[DemoSlide]:
    """What the demo asks about.

    Args:
        slide: feature file or slide image; None: the photograph and the virtual slide.
        encoder: of a slide image.
        work: folder for what is made of them.
    """
    if slide is None:
        photograph = _encoded(write_photograph(work), BUILT_IN, work, PHOTOGRAPH_PATCH_PX, "none")
        return [photograph, _virtual_slide(work)]
    if _is_image(slide):
        return [_encoded(slide.resolve(), encoder, work)]
    return [DemoSlide(slide.resolve())]


def _is_image(path: Path) -> bool:
    if SlideIdentity.of_file(path).content:  # a zarr store is a directory
        return False
    with open(path, "rb") as file:
        return is_image(path, file.read(64))


def write_photograph(folder: Path) -> Path:
    """scikit-image's photograph of stained colon (FHL2 by DAB, and haematoxylin) as a slide image of 512 x 512."""
    with needs_extra("slides"):
        import tifffile
        from skimage import data

    path, per_cm = folder / "immunohistochemistry.tiff", 1e4 / PHOTOGRAPH_MPP
    with tifffile.TiffWriter(path) as file:
        file.write(
            data.immunohistochemistry(),
            tile=(256, 256),
            photometric="rgb",
            resolution=(per_cm, per_cm),
            resolutionunit="CENTIMETER",
        )
    return path


def _encoded(
    image: Path, encoder_name: str, work: Path, patch_px: int = 224, tissue: Literal["otsu", "none"] = "otsu"
) -> DemoSlide:
    with needs_extra("slides"):
        from vllm_wsi.encoding.encode_slide import EncodeSettings, encode_slide
        from vllm_wsi.encoding.encoders import load_encoder

    progress = Progress(f"encoding {image.name} with {encoder_name}")
    encoder = load_encoder(encoder_name)
    features = work / f"{image.stem}.safetensors"
    encode_slide(image, features, encoder, EncodeSettings(patch_px=patch_px, tissue=tissue))
    progress.done()
    return DemoSlide(features, image, note=UNFAMILIAR)


def _virtual_slide(work: Path) -> DemoSlide:
    progress = Progress(f"making a virtual slide of {VIRTUAL_PATCHES:,} patches")
    virtual = HaystackWorld().slide("test", VIRTUAL_SLIDE, VIRTUAL_PATCHES)
    features = virtual.write(work / f"{virtual.name}.safetensors")
    progress.done()
    return DemoSlide(features, virtual=virtual, questions=(virtual.question(0), virtual.question(1)))
