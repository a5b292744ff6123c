"""Slide images that tests write."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tifffile

TILE = 256


def tissue_picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """RGB [h, w, 3]: purple-pink noise in the middle, glass around it."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 243, np.uint8)
    inside = (slice(height // 4, height * 3 // 4), slice(width // 4, width * 3 // 4))
    shape = picture[inside].shape
    picture[inside] = np.clip(rng.normal((170, 70, 150), 25, shape), 0, 255).astype(np.uint8)
    return picture


def write_tiff(path: Path, picture: np.ndarray, mpp: float | None = 0.5, tile: int = TILE) -> Path:
    """A generic tiled TIFF, which openslide reads."""
    resolution = {} if mpp is None else {"resolution": (1e4 / mpp,) * 2, "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, picture, tile=(tile, tile), photometric="rgb", compression="deflate", **resolution)
    return path


def write_ome_tiff(path: Path, picture: np.ndarray, mpp: float = 0.25, planar: bool = False, levels: int = 3) -> Path:
    """An OME-TIFF whose pyramid lies in sub-IFDs."""
    layout = {"tile": (TILE, TILE), "photometric": "rgb", "compression": "deflate"}
    if planar:
        layout["planarconfig"] = "separate"
    sizes = {f"PhysicalSize{axis}{what}": value for axis in "XY" for what, value in (("", mpp), ("Unit", "µm"))}
    with tifffile.TiffWriter(path, ome=True) as file:
        for level in range(levels):
            part = picture[:: 2**level, :: 2**level]
            part = np.ascontiguousarray(np.moveaxis(part, 2, 0)) if planar else part
            if level == 0:
                axes = "CYX" if planar else "YXS"
                file.write(part, subifds=levels - 1, metadata={"axes": axes, **sizes}, **layout)
            else:
                file.write(part, subfiletype=1, **layout)
    return path


def write_sparse_tiff(
    path: Path, size: tuple[int, int], tiles: Mapping[tuple[int, int], np.ndarray], tile: int
) -> Path:
    """A large slide of which only some tiles were scanned; `tiles`: column and row of the tile, and its pixels."""
    columns, rows = size[0] // tile, size[1] // tile

    def every_tile():
        for row in range(rows):
            for column in range(columns):
                first = np.full((tile, tile, 3), 255, np.uint8) if (row, column) == (0, 0) else None
                yield tiles.get((column, row), first)

    layout = {"tile": (tile, tile), "photometric": "rgb", "compression": "deflate"}
    tifffile.imwrite(path, every_tile(), shape=(rows * tile, columns * tile, 3), dtype="uint8", **layout)
    return path
