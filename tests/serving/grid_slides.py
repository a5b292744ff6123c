"""Slide images with feature files beside them: the real one, and one whose every patch has its own colour."""

import shutil
from pathlib import Path

import numpy as np
import tifffile

from vllm_wsi.slides import write_features

from .conftest import D

CELL = 200  # px, edge of a patch of the grid slide
COLUMNS, ROWS = 8, 6


def grid_colour(column: int, row: int) -> tuple[int, int, int]:
    return 20 + 25 * column, 20 + 35 * row, 230 - 20 * column


def make_grid_image(path: Path, resolution: tuple[int, int] = (20_000, 20_000)) -> Path:
    """A slide of 8 x 6 patches of one colour each, 1600 x 1200 px with a margin of one patch.

    Args:
        resolution: pixels per centimetre in each direction; the default is 0.5 microns a pixel.
    """
    pixels = np.full(((ROWS + 2) * CELL, (COLUMNS + 2) * CELL, 3), 255, np.uint8)
    for row in range(ROWS):
        for column in range(COLUMNS):
            y, x = (row + 1) * CELL, (column + 1) * CELL
            pixels[y : y + CELL, x : x + CELL] = grid_colour(column, row)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", resolution=resolution, resolutionunit=3)
    return path


def make_grid_slide(folder: Path, name: str = "grid", **metadata: str) -> Path:
    """Its feature file, rows in reading order; returns that."""
    image = make_grid_image(folder / f"{name}.tiff")
    coords = np.array([((x + 1) * CELL, (y + 1) * CELL) for y in range(ROWS) for x in range(COLUMNS)])
    said = {"encoder": "test@1", "patch_size_level0": str(CELL), "width": "2000", "height": "1600", "mpp": "0.5"}
    path = image.with_suffix(".safetensors")
    write_features(path, random_features(len(coords), 5), coords, said | metadata)
    return path


def make_real_slide(folder: Path, shared_data: Path) -> Path:
    """CMU-1-Small-Region with random features on a grid over its tissue; returns the feature file."""
    from vllm_wsi.encoding.image import open_image, thumbnail

    image_path = folder / "CMU-1-Small-Region.svs"
    shutil.copyfile(shared_data / "slides" / image_path.name, image_path)
    with open_image(image_path) as image:
        width, height = image.dimensions
        small = thumbnail(image, image_path.name, 600).astype(int)
    scale = width / small.shape[1]
    coloured = np.ptp(small, axis=2) > 20  # glass is grey
    coords = []
    for y in range(0, height - 223, 112):
        for x in range(0, width - 223, 112):
            part = coloured[int(y / scale) : int((y + 224) / scale), int(x / scale) : int((x + 224) / scale)]
            if part.mean() > 0.4:
                coords.append((x, y))
    path = image_path.with_suffix(".safetensors")
    said = {"encoder": "test@1", "patch_size_level0": "224", "width": str(width), "height": str(height), "mpp": "0.499"}
    write_features(path, random_features(len(coords), 6), np.array(coords), said)
    return path


def random_features(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)
