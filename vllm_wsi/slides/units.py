"""The unit of a file's coordinates: what its metadata say, under any key and spelling of the field, else the rule of
its format."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError

from .feature_file import CoordUnit, Source, Unit

MICRONS = {
    "um": 1.0, "μm": 1.0, "micron": 1.0, "microns": 1.0, "pm": 1e-6, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6,
    "in": 25_400.0, "inch": 25_400.0, "inches": 25_400.0,
} | {
    prefix + ending: scale
    for prefix, scale in (("micro", 1.0), ("nano", 1e-3), ("milli", 1e3), ("centi", 1e4), ("", 1e6))
    for ending in ("meter", "meters", "metre", "metres")
}  # fmt: skip
"""Microns in each unit of length, by its name in lower case, «μ» being the Greek letter."""

PIXELS = frozenset(
    ("px", "pixel", "pixels", "level0", "level-0", "level 0", "level0 px", "level-0 px", "level 0 px",
     "level0 pixels", "level-0 pixels", "level 0 pixels", "level0_pixels", "level0_px", "lv0")
)  # fmt: skip
UNIT_KEYS = ("unit", "units", "coord_unit", "coords_unit", "coord_units", "coordinate_unit", "coordinates_unit")
LEVEL0_KEYS = ("patch_size_level0", "patch_size_lv0", "patch_size_level_0", "tile_size_level0", "tile_size_lv0")
PIXEL_WRITERS = (*LEVEL0_KEYS, "level0_width", "level0_height", "level0_magnification", "patch_level")
"""Keys of producers that write level-0 pixels and do not name the unit: TRIDENT, CLAM."""

STAMP_V1_PX, STAMP_V1_UM = 224, 256.0
"""STAMP's first files hold pixels of tiles of 224, which are 256 microns (`get_coords` of its `modeling/data.py`)."""
STAMP_V1_SCALE = STAMP_V1_UM / STAMP_V1_PX  # microns in one of their numbers, which no other unit has

KEPT_UNIT, KEPT_UNIT_SOURCE, KEPT_UNIT_SCALE = "converted_unit", "converted_unit_source", "converted_unit_scale"
"""Metadata keys of a converted file: its source's unit, who said it, and how much of it one of the numbers is."""

GRID_SAMPLE = 1 << 14  # coordinates that a unit or a spacing is looked up in, for each slide that is selected


def positive_number(said: str | float | None) -> float | None:
    """A finite number above 0, as every size and scale here must be; None for anything else, NaN and text included."""
    if said is None or isinstance(said, bool):
        return None
    try:
        value = float(said)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def parse_unit(said: str) -> tuple[CoordUnit, float] | None:
    """(unit, so many of it in one of what is said); None: no unit that is known here."""
    name = " ".join(unicodedata.normalize("NFKC", said).casefold().split())
    if name in PIXELS:
        return "px", 1.0
    return ("um", MICRONS[name]) if name in MICRONS else None


def said_unit(name: str, metadata: Mapping[str, str]) -> Unit | None:
    """The unit that a file names, under any key of the field.

    Raises:
        SlideError: it is none that is known, or two keys differ.
    """
    found: dict[str, tuple[CoordUnit, float]] = {}
    for key in UNIT_KEYS:
        if not (said := metadata.get(key, "").strip()):
            continue
        parsed = parse_unit(said)
        if parsed is None:
            raise SlideError(f"{name}: {key}: found {said!r:.40}, wanted a unit: um, mm, nm, px or their full names")
        found[key] = parsed
    if len(set(found.values())) > 1:
        both = " and ".join(f"{key} = {metadata[key]!r:.40}" for key in found)
        raise SlideError(f"{name}: found {both}, wanted one unit")
    for unit, scale in found.values():
        return Unit(unit, "file", scale)
    return None


def kept_unit(name: str, metadata: Mapping[str, str]) -> Unit | None:
    """The unit of a converted file's coordinates; None: nothing told it in the source either.

    Raises:
        SlideError: the words are none that `convert` writes.
    """
    unit, source = metadata[KEPT_UNIT], metadata.get(KEPT_UNIT_SOURCE)
    if (unit, source) == ("unknown", None):
        return None
    if unit not in get_args(CoordUnit) or source not in get_args(Source):
        raise SlideError(
            f"{name}: {KEPT_UNIT}: found {unit!r:.40} by {source!r:.40}, wanted px or um by file or format"
        )
    said = metadata.get(KEPT_UNIT_SCALE)
    scale = positive_number(said)
    if scale is None:
        found = "none" if said is None else f"{said!r:.40}"
        raise SlideError(
            f"{name}: {KEPT_UNIT_SCALE}: found {found}, wanted a number above 0; remove the file and convert its "
            "source again"
        )
    return Unit(cast(CoordUnit, unit), cast(Source, source), scale)


def kept_metadata(unit: Unit | None) -> dict[str, str]:
    """What a converted file says of its coordinates' unit."""
    if unit is None:
        return {KEPT_UNIT: "unknown"}
    return {KEPT_UNIT: unit.unit, KEPT_UNIT_SOURCE: unit.source, KEPT_UNIT_SCALE: repr(float(unit.scale))}


def coord_unit(name: str, metadata: Mapping[str, str], stamp: bool, pixels: bool, sample: NDArray) -> Unit | None:
    """The unit of a file's coordinates; None: nothing tells it, so a user must.

    Args:
        name: of the file, for errors.
        metadata: the file's own.
        stamp: the file has the keys of STAMP and Marugoto (`feats`).
        pixels: this format always holds level-0 pixels where it says nothing else.
        sample: [n, 2] of its coordinates.

    Raises:
        SlideError: the file names an unknown unit, or two.
    """
    said = said_unit(name, metadata)
    if said is not None:
        return said
    if stamp and "tile_size_um" in metadata:
        return Unit("um", "format")
    if any(key in metadata for key in PIXEL_WRITERS):
        return Unit("px", "format")
    if stamp:
        tile = positive_number(metadata.get("tile_size"))
        if round(tile or _least_step(sample)) == STAMP_V1_PX:
            return Unit("um", "guess" if tile is None else "format", STAMP_V1_SCALE)
    if not np.array_equal(sample, np.floor(sample)):
        return None  # fractions alone say nothing
    return Unit("px", "format" if pixels else "guess")


def _least_step(coords: NDArray) -> float:
    """The least distance of two columns or rows, as STAMP's `get_stride`; 0 where there are none."""
    steps = [np.diff(np.unique(coords[:, axis])) for axis in (0, 1)]
    return min((float(step.min()) for step in steps if len(step)), default=0.0)


def one_unit(name: str, groups: Iterable[Mapping[str, str]]) -> None:
    """Raises SlideError where two parts of one file (its root and a dataset) name different units."""
    found = {unit for group in groups if (unit := said_unit(name, group)) is not None}
    if len(found) > 1:
        both = " and ".join(sorted(f"{unit.scale:g} {unit.unit}" for unit in found))
        raise SlideError(f"{name}: found coordinates in two units, of {both}, wanted one")


def unit_remarks(unit: Unit | None) -> list[str]:
    """What `doctor` notes of it."""
    if unit is None:
        return ["coords: nothing says their unit, and fractions tell none: it must be given to place the patches"]
    if unit.source != "guess":
        return []
    if unit.unit == "um":
        return ["coords: nothing says their unit; taken as STAMP's first format for their steps of 224: a guess"]
    return ["coords: nothing says their unit; taken as level-0 pixels because they are whole numbers: a guess"]
