"""Which files are one and the same slide: copies, links, and the several files of one DICOM series."""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from openslide import PROPERTY_NAME_QUICKHASH1, PROPERTY_NAME_VENDOR, OpenSlide, OpenSlideError

SAMPLE = 1 << 16  # bytes at both ends of a file, where no reader tells one slide from another


class SlideKey(NamedTuple):
    """Equal for the files of one slide, and seldom for those of two."""

    vendor: str
    hash: str


class Sameness(NamedTuple):
    """Of one file beside those before it."""

    as_slide: Path | None = None  # it is the same slide as this
    note: str = ""  # it only seems to be


def slide_key(path: Path) -> SlideKey | None:
    """openslide's quickhash, else size and both ends of the file; None where it cannot be read."""
    if not path.is_file():  # a pipe would wait for ever
        return None
    try:
        with OpenSlide(path) as image:
            vendor, quickhash = (image.properties.get(key) for key in (PROPERTY_NAME_VENDOR, PROPERTY_NAME_QUICKHASH1))
        if quickhash:
            return SlideKey(vendor or "", quickhash)
    except (OpenSlideError, ValueError, OSError):
        pass
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest = hashlib.blake2b(file.read(SAMPLE), digest_size=16)
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    except OSError:
        return None
    return SlideKey("", f"{size}:{digest.hexdigest()}")


def find_same(paths: Sequence[Path], keys: Sequence[SlideKey | None]) -> list[Sameness]:
    """For each file whether one before it is the same slide.

    Equal keys are not believed alone: except for DICOM, whose key is the series, the bytes must agree.
    """
    by_key: dict[SlideKey, list[Path]] = {}
    found = []
    for path, key in zip(paths, keys, strict=True):
        earlier = by_key.setdefault(key, []) if key is not None else []
        same = next((other for other in earlier if key is not None and _is_same(key, path, other)), None)
        if same is not None:
            found.append(Sameness(same))
            continue
        note = f"has the quickhash of {earlier[0]} but other bytes: encoded as a slide of its own" if earlier else ""
        found.append(Sameness(note=note))
        earlier.append(path)
    return found


def _is_same(key: SlideKey, path: Path, other: Path) -> bool:
    if key.vendor == "dicom":
        return True
    try:
        if path.samefile(other):
            return True
        if key.vendor == "mirax":  # the file is a thumbnail; the slide lies in the folder of its name
            path, other = path.with_suffix("") / "Slidedat.ini", other.with_suffix("") / "Slidedat.ini"
        return filecmp.cmp(path, other, shallow=False)
    except OSError:
        return False
