"""From a slide image to its feature file: tissue, patches, encoder, one safetensors file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from openslide import AbstractSlide
from pydantic import Field, model_validator

from vllm_wsi.errors import SlideError
from vllm_wsi.settings import Settings
from vllm_wsi.slides.feature_file import write_features
from vllm_wsi.slides.identity import SlideIdentity
from vllm_wsi.slides.places import bounds_metadata

from .encoders import USUAL_PATCH, PatchEncoder, PatchScale
from .image import image_mpp, open_image, read_scaled
from .patches import Tiling, TissueMethod, find_patches
from .qc import write_qc
from .tissue import MASK_VERSION

SOURCE = "encoded_from"  # metadata key: which slide image, and which state of it
MPP_SOURCE = "mpp_source"  # metadata key: who said the mpp, "slide" or "given"
MAX_UPSAMPLING = 1.1  # slides of 0.55 mpp serve as 0.5 mpp; coarser ones are overviews


class EncodeSettings(Settings, frozen=True):
    """What decides the patches of a slide, and how their features are kept."""

    patch_px: int | None = Field(None, ge=1)  # edge of a patch before the encoder scales it; None: the encoder's own
    patch_mpp: float | None = Field(None, gt=0)  # microns per pixel of those pixels; None: the encoder's own
    step_px: int | None = Field(None, ge=1)  # from patch to patch, in those pixels; None: no patch overlaps another
    mpp: float | None = Field(None, gt=0)  # microns per level-0 pixel, instead of what the slide says
    tissue: TissueMethod = "otsu"
    background: float = Field(0.3, ge=0, le=1)  # largest share of a patch beside the tissue
    channels: tuple[str, ...] | None = None  # names or numbers from 0 of the three that are encoded; None: RGB alone
    dtype: Literal["float16", "float32"] = "float16"  # of the features
    batch_size: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _check_step(self) -> EncodeSettings:
        if self.step_px is not None and self.patch_px is not None and self.step_px > self.patch_px:
            raise ValueError(f"step_px: found {self.step_px}, wanted at most the patch's edge, {self.patch_px}")
        return self

    def resolved(self, encoder: PatchEncoder) -> EncodeSettings:
        """With the encoder's own patches where none are said (224 px at 0.5 um where it takes any).

        Raises:
            SettingsError: a step that is longer than a patch.
        """
        own = encoder.patch or USUAL_PATCH
        px, mpp = self.patch_px or own.px, self.patch_mpp or own.mpp
        return self.changed(patch_px=px, patch_mpp=mpp, step_px=self.step_px or px)

    @property
    def patch(self) -> PatchScale:
        """Of settings that are resolved."""
        assert self.patch_px is not None
        assert self.patch_mpp is not None
        return PatchScale(self.patch_px, self.patch_mpp)

    def record(self) -> dict[str, str]:
        """What of this a feature file's metadata says, once it is resolved."""
        return {
            "patch_size": str(self.patch.px),
            "patch_mpp": f"{self.patch.mpp:g}",
            "step_size": str(self.step_px),
            "tissue": MASK_VERSION if self.tissue == "otsu" else self.tissue,
            "background": f"{self.background:g}",
            "channels": "RGB" if self.channels is None else ",".join(self.channels),
        }


@dataclass
class EncodeResult:
    """What came of one slide."""

    num_patches: int
    tissue_share: float | None  # of what was scanned; None: not looked for
    warnings: tuple[str, ...]  # what may be wrong with the choice of patches
    seconds: dict[str, float] = field(default_factory=dict)  # of reading, tissue, encoding, writing


def encode_slide(
    path: Path,
    out: Path,
    encoder: PatchEncoder,
    settings: EncodeSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    qc: Path | None = None,
) -> EncodeResult:
    """Writes the features of one slide; the file appears under its name only when it is whole.

    While one batch is encoded, the next is read.

    Args:
        path: slide image.
        out: feature file (`write_features`), with coordinates in level-0 pixels and metadata that says how it was made.
        settings: what they leave open is the encoder's own.
        on_progress: called with patches done and in all.
        qc: PNG file of what was taken for tissue, and of the patches.

    Raises:
        SlideError: the image cannot be read, changes meanwhile, says no mpp, is too coarse, holds no tissue, or is no
            stained tissue on bright glass and no channels were named.
    """
    source = SlideIdentity.of_file(path)
    name, seconds = str(path), dict.fromkeys(("reading", "tissue", "encoding", "writing"), 0.0)
    settings = settings.resolved(encoder)
    with open_image(path, settings.channels) as image:
        mpp = image_mpp(image, name, settings.mpp)
        began = time.perf_counter()
        tiling = _tile(image, name, mpp, settings)
        size_px = tiling.patch_px
        if qc is not None:
            write_qc(qc, tiling)
        seconds["tissue"] = time.perf_counter() - began
        features = np.empty((len(tiling.corners), encoder.feature_dim), settings.dtype)
        for start, batch, read_seconds in _batches(image, name, tiling.corners, size_px, settings):
            seconds["reading"] += read_seconds
            began = time.perf_counter()
            with np.errstate(over="ignore"):
                features[start : start + len(batch)] = encoder.encode(batch)
            seconds["encoding"] += time.perf_counter() - began
            on_progress(start + len(batch), len(features))
        about_image = _about_image(path, image)
    source.refuse_change(path)
    _check_finite(name, features)
    share = None if tiling.tissue is None else tiling.tissue.share
    metadata = settings.record() | about_image
    metadata |= {"encoder": encoder.id, "mpp": f"{mpp:g}", "patch_size_level0": str(size_px)}
    metadata |= {MPP_SOURCE: "slide" if settings.mpp is None else "given", SOURCE: json.dumps(source.record())}
    warnings = (*tiling.warnings, *_unusual_patches(encoder, settings.patch))
    metadata |= {} if share is None else {"tissue_share": f"{share:.4f}"}
    began = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_features(out, features, tiling.corners, metadata)
    seconds["writing"] = time.perf_counter() - began
    return EncodeResult(len(features), share, warnings, seconds)


def _tile(image: AbstractSlide, name: str, mpp: float, settings: EncodeSettings) -> Tiling:
    """The slide's patches; `mpp` is of level 0."""
    patch = settings.patch
    if patch.mpp / mpp < 1 / MAX_UPSAMPLING:
        raise SlideError(
            f"{name}: mpp: found {mpp:g}, an overview, wanted at most {patch.mpp * MAX_UPSAMPLING:g}; "
            "--mpp corrects a wrong number, --patch-mpp asks for coarser patches"
        )
    size_px, step_px = (max(1, round(edge * patch.mpp / mpp)) for edge in (patch.px, settings.step_px or patch.px))
    dark_ground = settings.channels is not None
    return find_patches(image, name, mpp, size_px, settings.tissue, settings.background, dark_ground, step_px)


def _unusual_patches(encoder: PatchEncoder, patch: PatchScale) -> tuple[str, ...]:
    """Says where an encoder is given other patches than its own: a checkpoint that knows it will not know these."""
    if encoder.patch is None or encoder.patch == patch:
        return ()
    found, wanted = (f"{one.px} px at {one.mpp:g} um" for one in (patch, encoder.patch))
    return (f"patches of {found}, and not of {wanted}, as checkpoints of {encoder.id} expect them",)


def _about_image(path: Path, image: AbstractSlide) -> dict[str, str]:
    """What the feature file records of the slide image."""
    width, height = image.dimensions
    sizes = {"width": str(width), "height": str(height)}
    names = {"slide_id": path.stem, "slide_file": path.name, "reader": type(image).__name__}
    return names | sizes | bounds_metadata(image.properties)


def _check_finite(name: str, features: NDArray) -> None:
    if not (finite := np.isfinite(features)).all():
        raise SlideError(
            f"{name}: features: found {int((~finite).sum())} values that are not finite in {features.dtype}, wanted "
            "none; --dtype float32 holds larger ones"
        )


def _batches(
    image: AbstractSlide, name: str, patches: NDArray[np.int32], size_px: int, settings: EncodeSettings
) -> Iterator[tuple[int, NDArray[np.uint8], float]]:
    """(first patch, RGB [n, patch_px, patch_px, 3], seconds of reading), one batch ahead of its use."""
    target = (settings.patch.px, settings.patch.px)

    def read(start: int) -> tuple[NDArray[np.uint8], float]:
        began = time.perf_counter()
        part = patches[start : start + settings.batch_size].tolist()
        batch = np.stack([read_scaled(image, name, x, y, size_px, size_px, target) for x, y in part])
        return batch, time.perf_counter() - began

    starts = range(0, len(patches), settings.batch_size)
    with ThreadPoolExecutor(1, thread_name_prefix="wsi-read") as pool:
        following: Future[tuple[NDArray[np.uint8], float]] = pool.submit(read, 0)
        for start in starts:
            batch, seconds = following.result()
            if start + settings.batch_size < len(patches):
                following = pool.submit(read, start + settings.batch_size)
            yield start, batch, seconds
