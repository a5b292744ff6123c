"""TIFF slides that openslide refuses, above all OME-TIFF, read by tifffile behind openslide's own interface."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
import zarr
from openslide import PROPERTY_NAME_MPP_X, PROPERTY_NAME_MPP_Y, PROPERTY_NAME_VENDOR, AbstractSlide
from PIL import Image

from .features import SlideError
from .places import parse_unit, positive_number

# What tifffile and its decoders raise for files that are damaged or that they do not know.
TIFF_ERRORS = (tifffile.TiffFileError, ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError, ImportError)


class TiffImage(AbstractSlide):
    """The largest 8-bit RGB series of a TIFF file, with its pyramid.

    Raises:
        SlideError: begins with what was found; `open_image` names the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            self._file = tifffile.TiffFile(path)
        except TIFF_ERRORS as error:
            raise SlideError(f"no readable TIFF ({error})") from error
        try:
            series = self._largest()
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
        usable = [s for s in self._file.series if s.axes in ("YXS", "SYX", "CYX") and s.dtype == np.uint8]
        usable = [s for s in usable if s.shape["YXS".index("S") if s.axes == "YXS" else 0] in (3, 4)]
        if not usable:
            kinds = ", ".join(f"{s.dtype} {s.axes} {s.shape}" for s in self._file.series[:3]) or "no images"
            raise SlideError(f"{kinds} where 8-bit RGB is needed")
        return max(usable, key=lambda s: np.prod(s.shape))

    def _size(self, level: Any) -> tuple[int, int]:
        """(width, height)"""
        height, width = level.shape[:2] if self._axes == "YXS" else level.shape[1:]
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
            if self._axes == "YXS":
                pixels = np.asarray(self._levels[level][y0:y1, x0:x1])
            else:
                pixels = np.moveaxis(np.asarray(self._levels[level][:, y0:y1, x0:x1]), 0, 2)
        except TIFF_ERRORS as error:
            raise OSError(str(error) or type(error).__name__) from error
        region.paste(Image.fromarray(np.ascontiguousarray(pixels[..., :3])), (x0 - x, y0 - y))
        return region


def _microns(pixels: ElementTree.Element, axis: str) -> float | None:
    value, said = positive_number(pixels.get(f"PhysicalSize{axis}")), pixels.get(f"PhysicalSize{axis}Unit", "um")
    unit = parse_unit(said)
    if value is None or unit == ("px", 1.0) or said == "reference frame":
        return None
    if unit is None:
        raise SlideError(f"PhysicalSize{axis}Unit {said!r:.40} where a unit of length is needed")
    return value * unit[1]
