"""Which files are slides by their names, and which slide image belongs to which features."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from vllm_wsi.files import FEATURE_SUFFIXES, IMAGE_SUFFIXES

from .formats.csv_features import is_feature_csv
from .identity import is_store

OME = ".ome"  # of a.ome.tif, whose features TRIDENT names a.h5
OME_SUFFIXES = (".tif", ".tiff", ".btf")


def is_feature_file(path: Path) -> bool:
    """Whether a listing shows that file as a slide: by its name, and a CSV by its first cells too.

    Directories are none; zarr stores, which are, `is_feature_store` knows.

    Raises:
        OSError: it is a CSV that cannot be read.
    """
    suffix, name = path.suffix.lower(), path.name.lower()
    if suffix not in FEATURE_SUFFIXES - {".zarr"} or name.endswith(".index.npz"):  # slideflow's, beside features
        return False
    return suffix != ".csv" or (path.is_file() and is_feature_csv(path))  # a pipe would hang


def is_feature_store(path: Path) -> bool:
    """Whether that directory is a zarr store, into which no search for slides goes."""
    return path.suffix.lower() == ".zarr" and is_store(path)


def slide_name(features: str) -> str:
    """The name of a feature file or store without its suffix."""
    suffix = PurePath(features).suffix
    return features.removesuffix(suffix) if suffix.lower() in FEATURE_SUFFIXES else features


def names_of_slide(name: str) -> Iterator[str]:
    """The names under which features of a slide or of a slide image are searched, the likeliest first: a.ome.tif,
    a.ome, a."""
    yield name
    suffix = PurePath(name).suffix
    if suffix.lower() in IMAGE_SUFFIXES:
        name = name.removesuffix(suffix)
        yield name
    if name.lower().endswith(OME):
        yield name[: -len(OME)]


def image_names(name: str, suffixes: frozenset[str]) -> Iterator[str]:
    """Of the slide images, with those suffixes, that may belong to features of that name."""
    if PurePath(name).suffix.lower() in suffixes:  # a.svs.h5
        yield name
    for ending in sorted(suffixes):
        yield from (f"{name}{ending}", f"{name}{ending.upper()}")
    for ending in OME_SUFFIXES:
        if ending in suffixes:
            yield from (f"{name}{OME}{ending}", f"{name}{OME.upper()}{ending.upper()}")


def walk_features(root: Path) -> Iterator[Path]:
    """Feature files and stores below a directory, sorted; hidden folders and the insides of stores left out."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        stores = [name for name in folders if is_feature_store(here / name)]
        folders[:] = [name for name in folders if name not in stores and not name.startswith(".")]
        found += [here / name for name in stores]
        for name in files:
            try:
                if is_feature_file(here / name):
                    found.append(here / name)
            except OSError:  # a CSV without read permission is not listed
                continue
    yield from sorted(found)
