"""Zarr stores, AnnData tables and parquet files as their producers write them, by the libraries that they use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

LAZYSLIDE = {"mpp": 0.25, "magnification": 40.0, "shape": [9000, 8000], "bounds": [100, 200, 7000, 8000]}
TILE_SPEC = {"height": 224, "width": 224, "mpp": 0.5, "base_level": 0, "base_downsample": 2.0}
LAZYSLIDE_READ = {
    "mpp": "0.25", "height": "9000", "width": "8000", "bounds_x": "100", "bounds_y": "200", "bounds_width": "7000",
    "bounds_height": "8000", "patch_size": "224", "target_mpp": "0.5",
}  # fmt: skip


def zarr_group(path: Path, arrays: Mapping[str, np.ndarray], zarr_format: int = 3, **how: Any) -> zarr.Group:
    """A group of arrays; `how` is how the first one is chunked and packed."""
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    for key, values in arrays.items():
        array = group.create_array(key, shape=values.shape, dtype=values.dtype, **how)
        array[...] = values
        how = {}
    return group


def fill_table(group: Any, features: np.ndarray, tile_ids: np.ndarray | None, places: np.ndarray | None) -> None:
    """An AnnData table in a zarr or an HDF5 group."""
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    put(group, "X", features)
    for name in ("obs", "obsm", "uns"):
        group.create_group(name)
    if tile_ids is not None:
        put(group, "obs/tile_id", tile_ids)
    if places is not None:
        put(group, "obsm/spatial", places.astype(float))
        for key, value in LAZYSLIDE.items():
            put(group, f"uns/slide_properties/{key}", np.asarray(value))
        for key, value in TILE_SPEC.items():
            put(group, f"uns/tile_spec/{key}", np.asarray(value))


def put(group: Any, key: str, values: np.ndarray) -> None:
    if isinstance(group, h5py.Group):
        group[key] = values
    else:
        group.create_array(key, shape=values.shape, dtype=values.dtype)[...] = values


def h5ad(path: Path, features: np.ndarray, places: np.ndarray | None) -> None:
    with h5py.File(path, "w") as file:
        fill_table(file, features, np.arange(len(features)), places)


def anndata_zarr(path: Path, features: np.ndarray, places: np.ndarray | None, zarr_format: int) -> None:
    fill_table(zarr.open_group(path, mode="w", zarr_format=zarr_format), features, None, places)


def spatial_zarr(
    path: Path, models: Mapping[str, np.ndarray], corners: np.ndarray, order: np.ndarray, side: int = 448,
    zarr_format: int = 3,
) -> None:  # fmt: skip
    """As lazyslide writes it: a table of features for each model, and the tiles in a table of their own.

    Args:
        corners: [N, 2] of each row of features.
        order: of the tiles in their table; tile_id tells which is which.
    """
    root = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    root.attrs.update({"slide_properties": LAZYSLIDE, "tile_spec": {"tiles": TILE_SPEC}})
    ids = np.arange(len(corners)) * 3 + 7
    for model, features in models.items():
        table = root.create_group(f"tables/{model}_tiles")
        fill_table(table, features, ids, None)
        table.attrs.update({"region": "tiles", "region_key": "library_id", "instance_key": "tile_id"})
    graph = root.create_group("tables/tiles_graph")  # a table without features
    graph.attrs.update({"encoding-type": "anndata"})
    shapes = root.create_group("shapes/tiles")
    shapes.attrs["coordinateTransformations"] = [{"type": "identity"}]
    write_tiles(path / "shapes/tiles/shapes.parquet", ids[order], corners[order], side)


def write_tiles(path: Path, ids: np.ndarray, corners: np.ndarray, side: int) -> None:
    pq.write_table(pa.table({"tile_id": ids, "geometry": [box(*corner, side) for corner in corners]}), path)


def box(x: float, y: float, side: float) -> bytes:
    """A rectangle in WKB, from its right upper corner on, as shapely writes it."""
    ring = [(x + side, y), (x + side, y + side), (x, y + side), (x, y), (x + side, y)]
    return b"\x01" + np.array([3, 1, 5], "<u4").tobytes() + np.array(ring, "<f8").tobytes()


def columns_parquet(path: Path, features: np.ndarray, prefix: str = "", **others: Any) -> None:
    columns = {f"{prefix}{i}": features[:, i] for i in range(features.shape[1])}
    pq.write_table(pa.table({**others, **columns}), path, row_group_size=8)


def lists_parquet(path: Path, features: np.ndarray, key: str, fixed: bool = False, **others: Any) -> None:
    values = pa.array(features.reshape(-1))
    width = features.shape[1]
    offsets = pa.array(np.arange(len(features) + 1, dtype=np.int32) * width)
    lists = pa.FixedSizeListArray.from_arrays(values, width) if fixed else pa.ListArray.from_arrays(offsets, values)
    pq.write_table(pa.table({**others, key: lists}), path, row_group_size=5)
