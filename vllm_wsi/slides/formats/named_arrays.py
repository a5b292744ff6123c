"""Which of a file's named arrays are the features, and which the coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.feature_file import Unit, listed, metadata_strings
from vllm_wsi.slides.units import GRID_SAMPLE, coord_unit, unit_remarks

FEATURE_KEYS = (
    "features", "feats", "embeddings", "feature", "feat", "embedding", "patch_features", "patch_embeddings",
    "tile_features", "tile_embeddings",
)  # fmt: skip
COORD_KEYS = ("coords", "coordinates", "coord", "xy")
AXES = (("x", "y"), ("coord_x", "coord_y"), ("x_coord", "y_coord"), ("coords_x", "coords_y"))
NUMBERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)) | {
    "float16", "float32", "float64",
}  # fmt: skip
NO_COORDS = "the file has no coords: kept patches have rows, but no place on the slide"
Load = Callable[[], NDArray]


class Coords(NamedTuple):
    """Coordinates of a file, for its `FeatureFile`."""

    unit: Unit | None = None
    load: Load | None = None
    remarks: tuple[str, ...] = (NO_COORDS,)

    def fields(self) -> dict[str, Any]:
        """For `FeatureFile`."""
        return {"unit": self.unit, "load_coords": self.load}


class Array(NamedTuple):
    """An array that has not been read."""

    shape: tuple[int, ...]
    dtype: str  # as NumPy or torch name it
    load: Load
    load_first: Callable[[int], NDArray] | None = None  # the first n of its numbers; None: it is read whole or not

    def first(self, count: int) -> NDArray:
        """[at most count] of its numbers in their order."""
        return self.load().reshape(-1)[:count] if self.load_first is None else self.load_first(count)


class Places(NamedTuple):
    """The coordinates of a file, before their unit is known."""

    key: str  # of the array, or of that for x
    load: Load  # [N, 2]
    sample: Load  # [n, 2], those that the unit is looked up in


def features_key(path: Path | str, names: Iterable[str], convert: str = "") -> str:
    """The name of the features. Raises SlideError where there is none of the field's names, or several."""
    names = list(names)
    found = [name for name in FEATURE_KEYS if name in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise SlideError(f"{path}: found several sets of features ({', '.join(found)}), wanted one")
    wanted = ", ".join(map(repr, FEATURE_KEYS[:2])) + f" or {FEATURE_KEYS[2]!r}"
    what = f"the keys {listed(names)}" if names else "no arrays"
    raise SlideError(f"{path}: found {what}, wanted features named {wanted}{convert}")


def find_places(path: Path | str, arrays: Mapping[str, Array], num_patches: int) -> Places | None:
    """The coordinates among a file's arrays: one of (N, 2) or (1, N, 2), or one each for x and y; None: none of them.

    Raises:
        SlideError: their shape or dtype.
    """
    for key in COORD_KEYS:
        if key in arrays:
            shape = arrays[key].shape
            if len(shape) == 3 and shape[0] == 1:
                shape = shape[1:]
            if shape != (num_patches, 2) or arrays[key].dtype not in NUMBERS:
                raise _not_coords(path, key, arrays[key], num_patches)
            return Places(key, partial(_pairs, arrays[key]), partial(_first_pairs, arrays[key]))
    for x, y in AXES:
        if x in arrays and y in arrays:
            for key in (x, y):
                if math.prod(arrays[key].shape) != num_patches or arrays[key].dtype not in NUMBERS:
                    raise _not_coords(path, key, arrays[key], num_patches)
            columns = arrays[x], arrays[y]
            return Places(x, partial(_columns, *columns), partial(_first_columns, *columns))
    return None


def find_coords(path: Path, arrays: Mapping[str, Array], num_patches: int, attributes: Mapping[str, object]) -> Coords:
    """The coordinates among a file's arrays, with the unit that the attributes tell.

    Raises:
        SlideError: their shape, or they cannot be read.
    """
    found = find_places(path, arrays, num_patches)
    return Coords() if found is None else _with_unit(path, found, attributes, False)


def placed(path: Path, load: Load, attributes: Mapping[str, object]) -> Coords:
    """Coordinates in the unit that the attributes tell, under the producers' own names, or else in level-0 pixels."""
    return _with_unit(path, Places("", load, lambda: load()[:GRID_SAMPLE]), attributes, True)


def _with_unit(path: Path, places: Places, attributes: Mapping[str, object], pixels: bool) -> Coords:
    unit = coord_unit(str(path), metadata_strings(path, attributes), False, pixels, places.sample())
    return Coords(unit, places.load, tuple(unit_remarks(unit)))


def _pairs(array: Array) -> NDArray:
    return array.load().reshape(-1, 2)


def _first_pairs(array: Array) -> NDArray:
    return array.first(2 * GRID_SAMPLE).reshape(-1, 2)


def _columns(x: Array, y: Array) -> NDArray:
    return np.stack([x.load().reshape(-1), y.load().reshape(-1)], axis=1)


def _first_columns(x: Array, y: Array) -> NDArray:
    return np.stack([x.first(GRID_SAMPLE), y.first(GRID_SAMPLE)], axis=1)


def _not_coords(path: Path | str, key: str, array: Array, num_patches: int) -> SlideError:
    return SlideError(
        f"{path}: {key}: found {array.dtype} of shape {array.shape}, wanted one x, y for each of {num_patches} patches"
    )
