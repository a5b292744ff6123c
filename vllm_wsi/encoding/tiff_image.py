"""TIFF slides that openslide refuses, above all OME-TIFF, read by tifffile behind openslide's own interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from openslide import PROPERTY_NAME_MPP_X, PROPERTY_NAME_MPP_Y, PROPERTY_NAME_VENDOR, AbstractSlide
from PIL import Image

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.units import parse_unit, positive_number

from .channels import ChannelError, check_rgb, is_rgb, listed, pick_channels

# What tifffile and its decoders raise for files that are damaged or that they do not know.
TIFF_ERRORS = (tifffile.TiffFileError, ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError, ImportError)


COLOUR = (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)


def is_colour_tiff(path: Path) -> bool:
    """Whether a TIFF's first page is 8-bit colour: openslide shows any other as colour too, and of several channels,
    each on a page of its own, the first alone."""
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            return page.photometric in COLOUR and page.samplesperpixel in (3, 4) and page.dtype == np.uint8
    except TIFF_ERRORS:
        return True  # openslide reads what tifffile does not


class TiffImage(AbstractSlide):
    """The largest picture of a TIFF file, with its pyramid: 8-bit RGB, or three 8-bit channels that were asked for.

    Separate planes of one sample are channels, whatever their number: three of them may be fluorescence as well. They
    are red, green and blue where they are called so.

    Args:
        channels: names or numbers from 0 of the three to take for red, green and blue.

    Raises:
        SlideError: begins with what was found; `open_image` names the file.
    """

    def __init__(self, path: Path, channels: Sequence[str] | None = None) -> None:
        super().__init__()
        try:
            self._file = tifffile.TiffFile(path)
        except TIFF_ERRORS as error:
            raise SlideError(f"no readable TIFF ({error})") from error
        try:
            series = self._largest()
            self._planes = self._chosen_planes(series, channels)
            self._axes = series.levels[0].axes
            self._levels: list[Any] = [zarr.open(series.aszarr(level=i), mode="r") for i in range(len(series.levels))]
            sizes = [self._size(level) for level in self._levels]
            # A pyramid's levels shrink; what does not is another picture.
            count = next((i for i in range(1, len(sizes)) if sizes[i][0] >= sizes[i - 1][0]), len(sizes))
            self._sizes = tuple(sizes[:count])
            self._properties = {PROPERTY_NAME_VENDOR: "ome-tiff" if self._file.is_ome else "tifffile"}
            if (mpp := self._mpp(series)) is not None:
                self._properties |= {PROPERTY_NAME_MPP_X: str(mpp[0]), PROPERTY_NAME_MPP_Y: str(mpp[1])}
            # A codec that is missing shows itself only when pixels are read.
            self.read_region((0, 0), len(self._sizes) - 1, (1, 1))
        except SlideError:
            self.close()
            raise
        except TIFF_ERRORS as error:
            self.close()
            raise SlideError(f"a TIFF that tifffile cannot decode ({error})") from error

    def _largest(self) -> tifffile.TiffPageSeries:
        """The slide itself and not its label, be that the only one in colour."""
        pictures = [s for s in self._file.series if {"Y", "X"} <= set(s.axes)]
        if not pictures:
            raise ChannelError("no images, wanted 8-bit RGB")
        areas = [s.shape[s.axes.index("Y")] * s.shape[s.axes.index("X")] for s in pictures]
        large = [s for s, area in zip(pictures, areas, strict=True) if area >= 0.99 * max(areas)]
        return next((s for s in large if self._is_colour(s)), large[0])

    @staticmethod
    def _is_colour(series: tifffile.TiffPageSeries) -> bool:
        page = series.keyframe
        # Planar colour is called CYX by some writers; its pages hold all three samples.
        return (
            series.axes in ("YXS", "SYX", "CYX")
            and series.dtype == np.uint8
            and page.photometric in COLOUR
            and page.samplesperpixel == series.shape[2 if series.axes == "YXS" else 0]
            and page.samplesperpixel in (3, 4)
        )

    def _chosen_planes(self, series: tifffile.TiffPageSeries, channels: Sequence[str] | None) -> tuple[int, ...]:
        if self._is_colour(series):
            if channels is not None:
                check_rgb(channels)
            return 0, 1, 2
        if series.axes not in ("YX", "CYX"):
            raise ChannelError(f"{series.dtype} {series.axes} {series.shape}, wanted 8-bit RGB")
        names = self._channel_names(series)
        count = f"{len(names)} channel{'s' if len(names) > 1 else ''} {listed(names)}"
        if series.dtype != np.uint8:
            raise ChannelError(
                f"{count} of {series.dtype}, wanted 8-bit RGB; how far each channel is to be scaled down, only who "
                "made it can say"
            )
        if channels is not None:
            return pick_channels(channels, names)
        if is_rgb(names):
            return 0, 1, 2
        raise ChannelError(f"{count}, wanted 8-bit RGB; --channels says which three")

    def _channel_names(self, series: tifffile.TiffPageSeries) -> list[str]:
        """As the file says, else their numbers."""
        count = series.shape[0] if series.axes == "CYX" else 1
        names: list[str | None] = []
        if self._file.is_ome and self._file.ome_metadata:
            images = ElementTree.fromstring(self._file.ome_metadata).findall("./{*}Image")
            place = next(i for i, other in enumerate(self._file.series) if other is series)
            if place < len(images):
                names = [entry.get("Name") for entry in images[place].iterfind("./{*}Pixels/{*}Channel")]
        elif self._file.is_qpi:
            names = [_qpi_channel(page) for page in series.pages]
        return [names[i] or str(i) if i < len(names) else str(i) for i in range(count)]

    def _size(self, level: Any) -> tuple[int, int]:
        """(width, height)"""
        height, width = (level.shape[self._axes.index(axis)] for axis in "YX")
        return int(width), int(height)

    def _mpp(self, series: tifffile.TiffPageSeries) -> tuple[float, float] | None:
        if self._file.is_ome and self._file.ome_metadata:
            pixels = ElementTree.fromstring(self._file.ome_metadata).iterfind(".//{*}Pixels")
            width, height = self._sizes[0]
            for entry in pixels:
                if (entry.get("SizeX"), entry.get("SizeY")) != (str(width), str(height)):
                    continue
                found = [_microns(entry, axis) for axis in "XY"]
                return (found[0], found[1]) if found[0] is not None and found[1] is not None else None
            return None
        page = series.keyframe
        if page.tags.get("XResolution") is None or page.resolutionunit == tifffile.RESUNIT.NONE:
            return None
        per_micron = page.get_resolution(tifffile.RESUNIT.MICROMETER)
        return (1 / per_micron[0], 1 / per_micron[1]) if min(per_micron) > 0 else None

    @classmethod
    def detect_format(cls, filename: Any) -> str | None:
        try:
            with tifffile.TiffFile(filename) as file:
                return "ome-tiff" if file.is_ome else "tifffile"
        except TIFF_ERRORS:
            return None

    def close(self) -> None:
        self._file.close()

    @property
    def level_count(self) -> int:
        return len(self._sizes)

    @property
    def level_dimensions(self) -> tuple[tuple[int, int], ...]:
        return self._sizes

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        (width, height), sizes = self._sizes[0], self._sizes
        return tuple((width / w + height / h) / 2 for w, h in sizes)

    @property
    def properties(self) -> Mapping[str, str]:
        return self._properties

    @property
    def associated_images(self) -> Mapping[str, Image.Image]:
        return {}

    def get_best_level_for_downsample(self, downsample: float) -> int:
        return max(i for i, scale in enumerate(self.level_downsamples) if i == 0 or scale <= downsample)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """As `OpenSlide.read_region`: RGBA, transparent beyond the slide."""
        scale = self.level_downsamples[level]
        x, y = (round(place / scale) for place in location)
        (width, height), (full_width, full_height) = size, self._sizes[level]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, full_width), min(y + height, full_height)
        region = Image.new("RGBA", size, (0, 0, 0, 0))
        if x1 <= x0 or y1 <= y0:
            return region
        try:
            pixels = self._read(level, slice(y0, y1), slice(x0, x1))
        except TIFF_ERRORS as error:
            raise OSError(str(error) or type(error).__name__) from error
        region.paste(Image.fromarray(np.ascontiguousarray(pixels)), (x0 - x, y0 - y))
        return region

    def _read(self, level: int, rows: slice, columns: slice) -> NDArray[np.uint8]:
        """RGB [h, w, 3]"""
        source = self._levels[level]
        if self._axes == "YXS":
            return np.asarray(source[rows, columns])[..., self._planes]
        if self._axes == "YX":
            return np.repeat(np.asarray(source[rows, columns])[..., None], 3, axis=2)
        planes = {i: np.asarray(source[i, rows, columns]) for i in set(self._planes)}
        return np.stack([planes[i] for i in self._planes], axis=2)


def _qpi_channel(page: object) -> str | None:
    """Of a page that an Akoya scanner wrote."""
    try:
        return ElementTree.fromstring(getattr(page, "description", "")).findtext(".//Name")
    except ElementTree.ParseError:
        return None


def _microns(pixels: ElementTree.Element, axis: str) -> float | None:
    value, said = positive_number(pixels.get(f"PhysicalSize{axis}")), pixels.get(f"PhysicalSize{axis}Unit", "um")
    unit = parse_unit(said)
    if value is None or unit == ("px", 1.0) or said == "reference frame":
        return None
    if unit is None:
        raise SlideError(f"PhysicalSize{axis}Unit {said!r:.40} where a unit of length is needed")
    return value * unit[1]
