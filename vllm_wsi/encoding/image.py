"""A slide image, as openslide reads it, or tifffile where openslide refuses it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from openslide import PROPERTY_NAME_MPP_X, PROPERTY_NAME_MPP_Y, AbstractSlide, OpenSlide, OpenSlideError
from PIL import Image

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.identity import SlideIdentity
from vllm_wsi.slides.units import positive_number

from .channels import ChannelError, check_rgb

MAX_ASPECT = 1.02  # of the two mpp of one slide
BAND_PX = 1 << 24  # level pixels that are held at once while a region is scaled down
WHITE = (255, 255, 255)


def open_image(path: str | os.PathLike[str], channels: Sequence[str] | None = None) -> AbstractSlide:
    """Opens a slide image; the caller closes it.

    Args:
        channels: names or numbers from 0 of the three to take for red, green and blue, where it is no RGB picture.

    Raises:
        SlideError: neither openslide nor tifffile can read it, or its first pixel is damaged, or it has other channels
            than red, green and blue.
    """
    path = Path(path)
    SlideIdentity.of_file(path)  # a pipe would wait for ever
    try:
        image = OpenSlide(path)
    except (OpenSlideError, ValueError) as error:
        return _open_tiff(path, channels, str(error))
    if image.detect_format(path) == "generic-tiff" and (refusal := _not_for_openslide(path, image)):
        image.close()
        return _open_tiff(path, channels, refusal)
    try:
        if channels is not None:
            check_rgb(channels)
    except ChannelError as error:
        image.close()
        raise SlideError(f"{path}: found {error}") from error
    try:
        read_scaled(image, str(path), 0, 0, 1, 1, (1, 1))
    except SlideError:
        image.close()
        raise
    return image


def _not_for_openslide(path: Path, image: OpenSlide) -> str:
    """Why openslide shows something else of a flat TIFF than what is in it; empty where it does not."""
    from .tiff_image import is_colour_tiff

    if "<OME" in image.properties.get("tiff.ImageDescription", ""):
        return "OME-TIFF, of which openslide sees neither the pyramid (sub-IFDs) nor the mpp"
    return "" if is_colour_tiff(path) else "TIFF of other samples than 8-bit RGB"


def _open_tiff(path: Path, channels: Sequence[str] | None, refusal: str) -> AbstractSlide:
    from .tiff_image import TiffImage

    try:
        return TiffImage(path, channels)
    except ChannelError as error:
        raise SlideError(f"{path}: found {error}") from error
    except SlideError as error:
        raise SlideError(f"{path}: found {error}, wanted a slide image; openslide says: {refusal}") from error


def image_mpp(image: AbstractSlide, name: str, given: float | None = None) -> float:
    """Microns per level-0 pixel: what is given, or else what the slide says.

    Raises:
        SlideError: nothing says it, or it is no finite number above 0, or the slide's pixels are not square; nothing
            is guessed, not from the objective power either.
    """
    if given is not None:
        if (mpp := positive_number(given)) is None:
            raise SlideError(f"{name}: mpp: found {given!r} given, wanted microns per pixel, a finite number above 0")
        return mpp
    said = [image.properties.get(key) for key in (PROPERTY_NAME_MPP_X, PROPERTY_NAME_MPP_Y)]
    if None in said:
        raise SlideError(f"{name}: mpp: found none in the slide, wanted it given (--mpp)")
    found = " x ".join(f"{text!r:.40}" for text in said)  # a header's text may be long
    x, y = map(positive_number, said)
    if x is None or y is None:
        raise SlideError(f"{name}: mpp: found {found} in the slide, wanted finite numbers above 0, or it given (--mpp)")
    if max(x, y) / min(x, y) > MAX_ASPECT:
        raise SlideError(f"{name}: mpp: found {x} x {y} in the slide, wanted one size for both directions (--mpp)")
    return (x + y) / 2


def read_scaled(
    image: AbstractSlide,
    name: str,
    x_px: float,
    y_px: float,
    width_px: float,
    height_px: float,
    size: tuple[int, int],
    with_alpha: bool = False,
) -> NDArray[np.uint8]:
    """A region at another scale, in bounded memory whatever the region's size.

    Args:
        x_px, y_px, width_px, height_px: of the region, in level-0 pixels; beyond the slide it is white.
        size: (width, height) of the result.
        with_alpha: also tell what was scanned there (255) from what the reader knows nothing of (0).

    Returns:
        RGB [height, width, 3], upon white; or RGBA [height, width, 4].

    Raises:
        SlideError: the file is damaged there; openslide reads nothing more from an image after that.
    """
    width, height = size
    level = image.get_best_level_for_downsample(max(1.0, min(width_px / width, height_px / height)) * 1.001)
    scale = image.level_downsamples[level]
    columns = math.ceil(width_px / scale) + 2
    band = max(1, int(BAND_PX / columns * height / max(1.0, height_px / scale)))  # output rows at a time
    out = np.empty((height, width, 4 if with_alpha else 3), np.uint8)
    left = math.floor(x_px / scale)
    for start in range(0, height, band):
        # One row more on each side: the filter that scales down reaches that far.
        top, bottom = max(0, start - 1), min(height, start + band + 1)
        y0, y1 = ((y_px + height_px * row / height) / scale for row in (top, bottom))
        first = math.floor(y0)
        location = (round(left * scale), round(first * scale))
        try:
            part = image.read_region(location, level, (columns, math.ceil(y1) - first + 1))
        except (OpenSlideError, ValueError, OSError) as error:
            raise SlideError(f"{name}: found damaged pixels ({error}), wanted a readable slide image") from error
        alpha = part.getchannel("A")
        flat = Image.new("RGB", part.size, WHITE)
        flat.paste(part, mask=alpha)
        x0 = x_px / scale - left
        box = (x0, y0 - first, x0 + width_px / scale, y1 - first)
        for plane, channels in ((flat, slice(0, 3)), (alpha, 3))[: 1 + with_alpha]:
            scaled = np.asarray(_resized(plane, (width, bottom - top), box))
            out[start : start + band, :, channels] = scaled[start - top : start - top + band]
    return out


def _resized(plane: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    if size == (box[2] - box[0], box[3] - box[1]) and box[0] == box[1] == 0:
        return plane.crop((0, 0, *size))
    return plane.resize(size, Image.Resampling.BILINEAR, box)


def thumbnail(image: AbstractSlide, name: str, max_side: int) -> NDArray[np.uint8]:
    """The whole slide, RGB [h, w, 3], its longer side at most `max_side`; carries no colour profile."""
    width, height = image.dimensions
    scale = max(1.0, max(width, height) / max_side)
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    return read_scaled(image, name, 0, 0, width, height, size)
