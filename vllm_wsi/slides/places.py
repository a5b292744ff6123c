"""Patch size and origin of a slide's patches, and their unit (`units.py`): what the file says, else what the user said,
else an error.

What is neither written in the file nor given by the user is a guess. Its `source` says so in `doctor`, in records and
in GeoJSON, and nothing is drawn upon a slide's image by a guess.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError

from .feature_file import CoordUnit, Source, Unit
from .units import GRID_SAMPLE, LEVEL0_KEYS, STAMP_V1_SCALE, STAMP_V1_UM, positive_number, said_unit

MICRON_KEYS = ("tile_size_um", "patch_size_um", "tile_um")
AGREE = 0.02  # two statements of one size may differ by so much, because sizes are rounded to pixels


class PatchSize(NamedTuple):
    """Edge of a file's square patches."""

    value: float
    unit: CoordUnit | None  # None: that of the coordinates, which nobody said yet
    source: Source


class Said(NamedTuple):
    """What a user says of a slide's patches."""

    mpp: float | None = None  # microns per level-0 pixel
    patch_size_px: float | None = None  # edge of a patch in level-0 pixels
    coord_unit: CoordUnit | None = None
    accept_guess: bool = False  # draw upon the slide's image by what is only guessed


class Origin(NamedTuple):
    """Where the scanned region begins (openslide.bounds-*), in level-0 pixels; (0, 0) for most slides."""

    x: float
    y: float
    source: Literal["file", "image", "unknown"]


def patch_size(metadata: Mapping[str, str], coords: NDArray, unit: Unit | None, name: str = "file") -> PatchSize | None:
    """What the file says of its patches' size under any name of the field, or else the spacing of their grid, a guess.

    STAMP's first format fixes it, and is itself perhaps a guess.

    Args:
        metadata: the file's own.
        coords: [N, 2] of all patches, in the unit.
        unit: of the coordinates; None: not known.
        name: of the file, for errors.

    Raises:
        SlideError: two keys say different sizes, or one says two different edges.
    """
    if unit is not None and unit.scale == STAMP_V1_SCALE:
        return PatchSize(STAMP_V1_UM, "um", unit.source)
    said = _said_sizes(name, metadata, None if unit is None else unit.unit)
    if said:
        (first, size), *others = said.items()
        for key, other in others:
            if other.unit == size.unit and abs(other.value - size.value) > AGREE * size.value:
                raise SlideError(
                    f"{name}: found {first} = {size.value:g} {size.unit} and {key} = {other.value:g} {other.unit}, "
                    "wanted one size of a patch"
                )
        return size
    coords = coords[:GRID_SAMPLE]
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    x, y = coords[order, 0], coords[order, 1]
    steps = np.diff(x)[np.diff(y) == 0]
    found, counts = np.unique(steps[steps > 0], return_counts=True)
    if not len(found):
        return None
    return PatchSize(float(found[counts.argmax()]), None if unit is None else unit.unit, "guess")


def said_patch_um(name: str, metadata: Mapping[str, str]) -> float | None:
    """Edge of a patch in microns, if the file alone says it: in microns, in level-0 pixels beside `mpp`, or as it was
    given to the encoder (`patch_size`, `patch_mpp`).

    Raises:
        SlideError: a key says two different edges.
    """
    unit, mpp = said_unit(name, metadata), positive_number(metadata.get("mpp"))
    for size in _said_sizes(name, metadata, None if unit is None else unit.unit).values():
        if size.unit == "um":
            return size.value
        if mpp is not None:
            return size.value * mpp
    patch, patch_mpp = (
        square(name, "patch_size", metadata.get("patch_size")),
        positive_number(metadata.get("patch_mpp")),
    )
    return None if patch is None or patch_mpp is None else patch * patch_mpp


def _said_sizes(name: str, metadata: Mapping[str, str], unit: CoordUnit | None) -> dict[str, PatchSize]:
    """Key -> size, the best first."""
    sizes: dict[str, PatchSize] = {}

    def add(key: str, value: float | None, unit: CoordUnit) -> None:
        if value is not None:
            sizes[key] = PatchSize(value, unit, "file")

    def edge(key: str) -> float | None:
        return square(name, key, metadata.get(key))

    for key in MICRON_KEYS if unit == "um" else ():
        add(key, edge(key), "um")
    for key in LEVEL0_KEYS:
        add(key, edge(key), "px")
    # CLAM: pixels of the level that was read, and how many of level 0 each of them is.
    patch, level = edge("patch_size"), metadata.get("patch_level", "").strip()
    if patch is not None and "downsample" in metadata:
        down = edge("downsample")
        add("patch_size x downsample", None if down is None else patch * down, "px")
    elif patch is not None and level in ("0", "0.0"):
        add("patch_size at patch_level 0", patch, "px")
    if patch is not None and "downsample" not in metadata:  # TRIDENT
        magnifications = [positive_number(metadata.get(f"{key}_magnification")) for key in ("level0", "target")]
        if magnifications[0] is not None and magnifications[1] is not None:
            add("patch_size x magnifications", round(patch * magnifications[0] / magnifications[1]), "px")
    for key in () if unit == "um" else MICRON_KEYS:
        add(key, edge(key), "um")
    tile, said = edge("tile_size"), said_unit(name, metadata)
    if tile is not None and said is not None:
        add("tile_size", tile * said.scale, said.unit)  # STAMP 2.0: in the unit of the coordinates
    return sizes


def square(name: str, key: str, said: str | None) -> float | None:
    """One number of a file: as it is, or as a list of one or of two equal ones; None: it says no number above 0.

    Raises:
        SlideError: two different numbers.
    """
    numbers = _numbers(said)
    if numbers is None:
        return None
    if len(numbers) > 2 or abs(numbers[0] - numbers[-1]) > AGREE * numbers[0]:
        raise SlideError(f"{name}: {key}: found {said!r:.40}, wanted one number, the edge of a square")
    return numbers[0]


def _numbers(said: str | None) -> list[float] | None:
    if said is None:
        return None
    if (one := positive_number(said)) is not None:
        return [one]
    try:
        held = json.loads(said)
    except ValueError:
        return None
    while isinstance(held, list) and len(held) == 1 and isinstance(held[0], list):
        held = held[0]
    if not isinstance(held, list) or not held:
        return None
    numbers = [number for one in held if isinstance(one, (int, float)) and (number := positive_number(one)) is not None]
    return numbers if len(numbers) == len(held) else None


def with_image_mpp(said: Said, metadata: Mapping[str, str], image_mpp: Callable[[], float | None]) -> Said:
    """Adds microns per pixel to what the user says, where neither the user nor the feature file says it.

    Args:
        metadata: the feature file's own.
        image_mpp: what the slide's image says; called only where it is needed. None: nothing that can be used.
    """
    if said.mpp is not None or positive_number(metadata.get("mpp")) is not None:
        return said
    return said._replace(mpp=image_mpp())


def settle(name: str, chosen: Unit | None, size: PatchSize | None, said: Said) -> tuple[Unit | None, PatchSize | None]:
    """Unit and size by the file and the user together. A unit that the user gives is that of the file's own numbers.

    Args:
        chosen: unit of the coordinates, by the file.
        size: of a patch, by the file or a guess.

    Raises:
        SlideError: the file itself says something else than the user.
    """
    if said.coord_unit is not None:
        if chosen is not None and chosen.source != "guess" and chosen.unit != said.coord_unit:
            raise SlideError(f"{name}: found coordinates in {chosen.unit} by the file, but {said.coord_unit} was given")
        if chosen is None or chosen.source == "guess":
            if size is not None and size.source == "guess":
                scale = 1.0 if chosen is None else chosen.scale
                size = PatchSize(size.value / scale, said.coord_unit, "guess")
            chosen = Unit(said.coord_unit, "given")
    if said.patch_size_px is not None:
        in_file = size.value if size is not None and size.source == "file" and size.unit == "px" else None
        if in_file is not None and abs(in_file - said.patch_size_px) > AGREE * in_file:
            raise SlideError(
                f"{name}: patch_size_level0: found {in_file:g} px in the file, but {said.patch_size_px:g} was given"
            )
        size = PatchSize(said.patch_size_px, "px", "given")
    return chosen, size


def overruled_mpp(metadata: Mapping[str, str], said: Said) -> str | None:
    """In words, where the user's microns per pixel are others than the file's; None: they agree, or one is silent."""
    in_file = positive_number(metadata.get("mpp"))
    if said.mpp is None or in_file is None or abs(in_file - said.mpp) <= AGREE * in_file:
        return None
    return f"mpp: found {in_file:g} in the file, but {said.mpp:g} was given, which is taken"


def guesses(unit: Unit | None, size: PatchSize | None) -> list[str]:
    """What of a slide's places is only guessed, in words."""
    found = []
    if unit is not None and unit.source == "guess":
        each = "" if unit.scale == 1 else f", {unit.scale:g} in each of the file's numbers"
        found.append(f"the unit of the coordinates ({unit.unit}{each})")
    if size is not None and size.source == "guess":
        found.append(f"the size of a patch ({size.value:g} {size.unit}, the spacing of the grid)")
    return found


def refuse_guesses(name: str, guessed: Sequence[str]) -> None:
    """Raises SlideError where a drawing upon a slide's image would rest on a guess."""
    if guessed:
        raise SlideError(
            f"{name}: found no word about {' and '.join(guessed)}, wanted it given (coord_unit, "
            "patch_size_level0), or the guess accepted (accept_guess), to draw upon the slide's image"
        )


def bounds_metadata(properties: Mapping[str, Any]) -> dict[str, str]:
    """What a feature file says of a slide's bounds, out of an openslide image's properties; {} where it has none."""
    keys = {f"bounds_{part}": properties.get(f"openslide.bounds-{part}") for part in ("x", "y", "width", "height")}
    return {} if None in keys.values() else {key: str(value) for key, value in keys.items()}


def origin(name: str, metadata: Mapping[str, str], image: Mapping[str, Any] | None) -> Origin:
    """Where QuPath and others that crop a slide to its bounds begin to count.

    Args:
        metadata: of the feature file.
        image: properties of the slide's image (`openslide.bounds-x` ...), where it is at hand.

    Raises:
        SlideError: file and image differ.
    """
    said = _corner(metadata.get("bounds_x"), metadata.get("bounds_y"))
    if image is not None:
        seen = _corner(image.get("openslide.bounds-x"), image.get("openslide.bounds-y")) or (0.0, 0.0)
        if said is not None and said != seen:
            raise SlideError(
                f"{name}: bounds: found an origin of {said[0]:g}, {said[1]:g} in the file and {seen[0]:g}, {seen[1]:g} "
                "in the slide's image, wanted one; the image may be another slide's"
            )
        return Origin(*seen, "image")
    if said is not None:
        return Origin(*said, "file")
    # `encode` writes the bounds of every slide that has some, and its reader's name of every slide.
    return Origin(0.0, 0.0, "file" if "reader" in metadata and "slide_file" in metadata else "unknown")


def _corner(x: Any, y: Any) -> tuple[float, float] | None:
    try:
        corner = float(x), float(y)
    except (TypeError, ValueError):
        return None
    return corner if all(map(math.isfinite, corner)) else None
