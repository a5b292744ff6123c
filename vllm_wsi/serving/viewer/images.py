"""Slide images of an API server: keeps a few open, on threads of their own, and cuts deep-zoom tiles. openslide is
imported with the first image, not at the server's start.
"""

from __future__ import annotations

import asyncio
import io
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from vllm_wsi.errors import SlideError
from vllm_wsi.serving.client_errors import naming_the_file_alone, stalls_as_503
from vllm_wsi.serving.stalling_pool import StallingPool
from vllm_wsi.slides import SlideIdentity

if TYPE_CHECKING:
    from openslide import AbstractSlide
    from PIL import Image

TILE_PX = 512  # also the largest side of a region
MAX_READ_PX = 64 << 20  # level pixels that one tile or thumbnail may decode
OPEN_IMAGES = 4
THREADS = 4
JPEG_QUALITY = 85
T = TypeVar("T")


class NotThere(SlideError):
    """A client asked for a part that an image does not have; the image itself is sound."""


@dataclass
class _Open:
    image: AbstractSlide
    users: int = 0
    dropped: bool = False  # to be closed by its last user
    lock: threading.Lock = field(default_factory=threading.Lock)


class Threads:
    """A few threads for work that may be slow. It can delay work of its own kind, but neither the event loop nor
    selections."""

    def __init__(self, name: str) -> None:
        self._pool = StallingPool(name, THREADS)

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Raises SlideError also where a file or a folder may not be read; answers a 503 where all threads stall."""
        try:
            with stalls_as_503():
                return await asyncio.wrap_future(self._pool.submit(function, *args))
        except OSError as error:
            name = Path(str(error.filename or "file")).name
            raise SlideError(f"{name}: found no way to read it ({error.strerror or error}), wanted a slide") from error


class ImagePool:
    """Opens slide images once and keeps the last few open, each under its file's identity."""

    def __init__(self, size: int = OPEN_IMAGES) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._open: OrderedDict[SlideIdentity, _Open] = OrderedDict()

    @contextmanager
    def image(self, path: Path) -> Iterator[AbstractSlide]:
        """An open image; one that fails is not used again.

        Raises:
            SlideError: it cannot be read, or the extra `slides` is not installed; names the file, not its folder.
        """
        with naming_the_file_alone(path):
            entry = self._take(path)
            try:
                with entry.lock if type(entry.image).__name__ != "OpenSlide" else _no_lock():
                    yield entry.image
            except NotThere:
                raise
            except Exception as error:
                self._drop(entry)
                if isinstance(error, ValueError):
                    raise
                raise SlideError(f"{path.name}: found damaged pixels ({error}), wanted a slide image") from error
            finally:
                self._give_back(entry)

    def _take(self, path: Path) -> _Open:
        identity = SlideIdentity.of_file(path)
        with self._lock:
            entry = self._open.get(identity)
            if entry is not None:
                self._open.move_to_end(identity)
                entry.users += 1
                return entry
        try:
            from vllm_wsi.encoding.image import open_image

            new = _Open(open_image(path))
        except ImportError as error:
            raise SlideError(
                f"{path.name}: found {error.name or error} missing, wanted pip install 'vllm-wsi[slides]' to read it"
            ) from error
        with self._lock:
            entry = self._open.setdefault(identity, new)  # another thread may have been quicker
            entry.users += 1
            if len(self._open) > self._size:
                self._close_unused(self._open.popitem(last=False)[1])
        if entry is not new:
            new.image.close()
        return entry

    def _give_back(self, entry: _Open) -> None:
        with self._lock:
            entry.users -= 1
            if entry.dropped and entry.users == 0:
                entry.image.close()

    def _drop(self, entry: _Open) -> None:
        with self._lock:
            for identity, other in list(self._open.items()):
                if other is entry:
                    del self._open[identity]
                    self._close_unused(entry)

    @staticmethod
    def _close_unused(entry: _Open) -> None:
        entry.dropped = True
        if entry.users == 0:
            entry.image.close()


@contextmanager
def _no_lock() -> Iterator[None]:
    """openslide reads one image on many threads."""
    yield


class DeepZoom(NamedTuple):
    """Levels of halved size, the largest number being the full image; tiles of `TILE_PX` without overlap."""

    width_px: int
    height_px: int
    min_level: int  # the whole image in one tile, or what can still be read at a bounded cost
    max_level: int

    def scale(self, level: int) -> int:
        """Level-0 pixels for each pixel of a level."""
        return 1 << (self.max_level - level)


def deep_zoom(image: AbstractSlide) -> DeepZoom:
    width, height = image.dimensions
    level = max_level = math.ceil(math.log2(max(width, height, 1)))
    while max(width, height) > (side := TILE_PX << (max_level - level)):
        if read_px(image, min(2 * side, width), min(2 * side, height), 2 * side / TILE_PX) > MAX_READ_PX:
            break
        level -= 1
    return DeepZoom(width, height, level, max_level)


def read_px(image: AbstractSlide, width_px: float, height_px: float, scale: float) -> float:
    """Pixels that must be decoded for a region of the slide, scaled down so many times."""
    level = image.get_best_level_for_downsample(max(1.0, scale) * 1.001)
    return width_px * height_px / image.level_downsamples[level] ** 2


def tile(image: AbstractSlide, name: str, level: int, x: int, y: int) -> bytes:
    """JPEG of one tile, at most `TILE_PX` wide and high.

    Raises:
        NotThere: there is no such tile.
        SlideError: its pixels are damaged.
    """
    from PIL import Image as Images

    from vllm_wsi.encoding.image import read_scaled

    zoom = deep_zoom(image)
    if not zoom.min_level <= level <= zoom.max_level:
        raise NotThere(f"{name}: level: found {level}, wanted {zoom.min_level} .. {zoom.max_level}")
    scale = zoom.scale(level)
    side = TILE_PX * scale
    columns, rows = (math.ceil(length / side) for length in (zoom.width_px, zoom.height_px))
    if not (0 <= x < columns and 0 <= y < rows):
        raise NotThere(f"{name}: tile: found {x}, {y} at level {level}, wanted 0 .. {columns - 1}, 0 .. {rows - 1}")
    left, top = x * side, y * side
    width, height = min(side, zoom.width_px - left), min(side, zoom.height_px - top)
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    pixels = read_scaled(image, name, left, top, width, height, size)
    return jpeg(Images.fromarray(pixels))


def region(image: AbstractSlide, name: str, rect: tuple[float, float, float, float], side: int) -> bytes:
    """JPEG of x, y, width, height in level-0 pixels, its longer side of so many pixels.

    Raises:
        NotThere: it lies outside the slide, or would cost too much to read.
        SlideError: its pixels are damaged.
    """
    from PIL import Image as Images

    from vllm_wsi.encoding.image import read_scaled

    x, y, width, height = rect
    slide_width, slide_height = image.dimensions
    if not (width > 0 and height > 0 and -width < x < slide_width and -height < y < slide_height):
        found = ", ".join(f"{value:g}" for value in rect)
        raise NotThere(f"{name}: region: found {found}, wanted one within {slide_width} x {slide_height} px")
    scale = max(width, height) / side
    if (pixels := read_px(image, width, height, scale)) > MAX_READ_PX:
        raise NotThere(f"{name}: region: found {pixels:.3g} pixels to read, wanted at most {MAX_READ_PX:.3g}")
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    return jpeg(Images.fromarray(read_scaled(image, name, x, y, width, height, size)))


def jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
