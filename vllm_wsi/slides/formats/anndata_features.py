"""AnnData tables of features, as lazyslide and scanpy write them, in HDF5 (.h5ad) or in zarr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.feature_file import check_matrix, shown

from .named_arrays import AXES, Array, Coords, find_coords

PLACES = ("spatial", "coords", "X_spatial")  # of obsm


class StoredArray(Protocol):
    """An array that has not been read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def read(self) -> NDArray:
        """All of it. Raises SlideError where it is large or damaged."""


class Source(Protocol):
    """A file or store of named arrays in groups ("" is the root); links are not followed."""

    path: Path

    def names(self, key: str) -> list[str]: ...

    def is_array(self, key: str) -> bool: ...

    def attributes(self, key: str) -> Mapping[str, Any]: ...

    def array(self, key: str) -> StoredArray: ...


def is_table(source: Source, group: str = "") -> bool:
    """Whether that group is an AnnData table."""
    return {"X", "obs"} <= set(source.names(group)) or source.attributes(group).get("encoding-type") == "anndata"


def matrix_key(source: Source, group: str = "") -> str:
    """The key of a table's features. Raises SlideError where they are not a dense matrix."""
    key = join(group, "X")
    if not source.is_array(key):
        form = source.attributes(key).get("encoding-type", "group") if "X" in source.names(group) else None
        found = "no X" if form is None else f"a {shown(form)}"
        raise SlideError(
            f"{source.path}: {key}: found {found}, wanted dense features (N, d); "
            "write it once: adata.X = adata.X.toarray()"
        )
    return key


def table_shape(source: Source, key: str) -> tuple[int, int, str]:
    """(N, d, dtype) of a table's features."""
    array = source.array(key)
    return *check_matrix(source.path, key, array.shape, array.dtype), array.dtype


def column(source: Source, group: str, name: str) -> StoredArray | None:
    """A column of numbers of a table's rows."""
    key = join(group, f"obs/{name}")
    return source.array(key) if source.is_array(key) else None


def table_attributes(source: Source, group: str = "") -> dict[str, object]:
    """What lazyslide says in `uns` of slide and tiles."""
    return lazyslide_attributes(_values(source, join(group, "uns/slide_properties")),
                                _values(source, join(group, "uns/tile_spec")))  # fmt: skip


def lazyslide_attributes(slide: Mapping[str, Any], tile: Mapping[str, Any]) -> dict[str, object]:
    """Metadata out of lazyslide's `slide_properties` and `tile_spec`, whose own mpp is that of the tiles."""
    found: dict[str, object] = {}
    if slide.get("mpp"):
        found["mpp"] = slide["mpp"]
    if len(shape := np.asarray(slide.get("shape", ())).reshape(-1)) == 2:
        found |= {"height": int(shape[0]), "width": int(shape[1])}
    if len(bounds := np.asarray(slide.get("bounds", ())).reshape(-1)) == 4:
        found |= dict(zip(("bounds_x", "bounds_y", "bounds_width", "bounds_height"), map(int, bounds), strict=True))
    if tile.get("width") and tile.get("base_downsample"):
        found |= {"patch_size": int(tile["width"]), "target_mpp": tile.get("mpp")}
        if tile["width"] == tile.get("height"):
            found["patch_size_level0"] = int(tile["width"] * tile["base_downsample"])
    return found


def table_coords(source: Source, group: str, num_patches: int, attributes: Mapping[str, object]) -> Coords:
    """Each row's place, as `obsm` or columns of `obs` say it."""
    arrays: dict[str, Array] = {}
    for name in PLACES:
        key = join(group, f"obsm/{name}")
        if source.is_array(key):
            array = source.array(key)
            arrays["coords"] = Array(array.shape, array.dtype, array.read)
            break
    for name in {name for pair in AXES for name in pair}:
        if (axis := column(source, group, name)) is not None:
            arrays[name] = Array(axis.shape, axis.dtype, axis.read)
    return find_coords(source.path, arrays, num_patches, attributes)


def join(group: str, name: str) -> str:
    """The key of what lies in a group."""
    return f"{group}/{name}" if group else name


def _values(source: Source, group: str) -> dict[str, Any]:
    """Numbers of a dict in `uns`: single ones and short arrays."""
    found: dict[str, Any] = {}
    for name in source.names(group)[:100]:
        key = f"{group}/{name}"
        if not source.is_array(key):
            continue
        try:
            array = source.array(key)
        except SlideError:  # text, which zarr stores in a codec that is not read here
            continue
        if array.shape in ((), (2,), (4,)) and array.dtype.rstrip("0123456789") in ("int", "uint", "float"):
            value = array.read()
            found[name] = value.item() if value.shape == () else value
    return found
