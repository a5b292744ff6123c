"""Feature stores of zarr: SpatialData (lazyslide, wsidata), AnnData, and groups of plain arrays (tiatoolbox)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.feature_file import FeatureFile, check_matrix, listed, metadata_strings, shown
from vllm_wsi.slides.identity import SlideIdentity

from . import anndata_features as tables
from .named_arrays import NO_COORDS, Array, Coords, features_key, find_coords, placed
from .parquet_table import ParquetTable
from .zarr_store import ZarrStore

BOX_BYTES = 93  # of a rectangle in WKB: a polygon of one ring of five corners
BOX = np.dtype([("order", "u1"), ("kind", "<u4"), ("rings", "<u4"), ("points", "<u4"), ("xy", "<f8", (5, 2))])


def open_zarr(path: Path, identity: SlideIdentity, encoder: str | None) -> FeatureFile:
    """Opens a zarr store; `encoder` chooses among the tables of a SpatialData store.

    Raises:
        SlideError: no features, several without a choice, links, chunks that are missing or too large.
    """
    store = ZarrStore(path)
    if "tables" in store.names():
        return _open_spatial(store, identity, encoder)
    if tables.is_table(store):
        attributes = tables.table_attributes(store)
        key = tables.matrix_key(store)
        n, _, _ = tables.table_shape(store, key)
        return _feature_file(
            store, identity, "AnnData zarr", key, attributes, tables.table_coords(store, "", n, attributes)
        )
    return _open_plain(store, identity)


def _feature_file(
    store: ZarrStore, identity: SlideIdentity, form: str, key: str, attributes: Mapping[str, object], coords: Coords
) -> FeatureFile:
    array = store.array(key)
    n, d = check_matrix(store.path, key, array.shape, array.dtype)
    array.check_whole()
    return FeatureFile(
        str(store.path), form, key, n, d, array.dtype, array, identity, metadata_strings(store.path, attributes),
        **coords.fields(), remarks=coords.remarks,
    )  # fmt: skip


def _open_plain(store: ZarrStore, identity: SlideIdentity) -> FeatureFile:
    """A store that is one array, or a group of arrays under names that the field uses."""
    if store.is_array(""):
        return _feature_file(store, identity, "zarr", "", {}, Coords())
    names = [name for name in store.names() if store.is_array(name)]
    key = features_key(store.path, names)
    n, _ = check_matrix(store.path, key, store.array(key).shape, store.array(key).dtype)
    found = {name: store.array(name) for name in names if name != key}
    attributes = {k: v for k, v in store.attributes().items() if isinstance(v, (str, int, float, bool))}
    boxes = found.get("coordinates")
    if boxes is not None and boxes.shape == (n, 4):
        return _feature_file(store, identity, "tiatoolbox zarr", key, attributes, Coords(remarks=(
            "coordinates: tiatoolbox's count pixels of the resolution that was read, which the store does not say: "
            "kept patches have rows, but no place on the slide",
        )))  # fmt: skip
    arrays = {name: Array(one.shape, one.dtype, one.read) for name, one in found.items()}
    return _feature_file(store, identity, "zarr", key, attributes, find_coords(store.path, arrays, n, attributes))


def _open_spatial(store: ZarrStore, identity: SlideIdentity, encoder: str | None) -> FeatureFile:
    name = _choose(store, encoder)
    group = f"tables/{name}"
    key, said = tables.matrix_key(store, group), store.attributes(group)
    n, _, _ = tables.table_shape(store, key)
    region = said.get("region")
    region = region[0] if isinstance(region, list) and len(region) == 1 else region
    root = store.attributes()
    tile = _dict(_dict(root, "tile_spec"), region) if isinstance(region, str) else {}
    attributes = tables.lazyslide_attributes(_dict(root, "slide_properties"), tile)
    attributes["encoder"] = name.removesuffix(f"_{region}")
    if not isinstance(region, str) or region not in store.names("shapes"):
        return _feature_file(store, identity, "SpatialData zarr", key, attributes, Coords())
    coords = _tile_coords(store, group, region, n, attributes)
    return _feature_file(store, identity, "SpatialData zarr", key, attributes, coords)


def _choose(store: ZarrStore, encoder: str | None) -> str:
    """The table of features; graphs of tiles are tables too, without features."""
    names = [name for name in store.names("tables") if store.is_array(f"tables/{name}/X")]
    if encoder is not None:
        chosen = [name for name in names if name == encoder] or [
            name for name in names if name == f"{encoder}_{store.attributes(f'tables/{name}').get('region')}"
        ]
        if len(chosen) != 1:
            raise SlideError(f"{store.path}: tables: found {listed(names)}, wanted encoder {shown(encoder)!r}")
        return chosen[0]
    if len(names) != 1:
        found = listed(names) or "no features"
        raise SlideError(f"{store.path}: tables: found {found}, wanted one choice among them (#encoder=NAME)")
    return names[0]


def _dict(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _tile_coords(store: ZarrStore, group: str, region: str, num_patches: int, attributes: dict[str, object]) -> Coords:
    """The tiles' corners, joined by tile_id: the rows of features and tiles need not have one order."""
    ids = tables.column(store, group, "tile_id")
    tiles = store.path / "shapes" / region / "shapes.parquet"
    transforms = store.attributes(f"shapes/{region}").get("coordinateTransformations", [])
    if not isinstance(transforms, list) or any(_dict({"t": t}, "t").get("type") != "identity" for t in transforms):
        return Coords(remarks=(f"shapes/{region}: its tiles are moved by a transformation: no place on the slide",))
    if ids is None or not tiles.is_file():
        return Coords(remarks=(f"{group}: no tile_id says which tile of {region} a row is: no place on the slide",))
    if ids.shape != (num_patches,):
        raise SlideError(f"{store.path}: {group}/obs/tile_id: found shape {ids.shape}, wanted ({num_patches},)")
    table = ParquetTable(tiles)
    try:
        if not {"tile_id", "geometry"} <= set(table.schema.names):
            return Coords(remarks=(f"shapes/{region}: {NO_COORDS}",))
        corners, side = _join(store, region, table, ids.read())
    finally:
        table.close()
    if side is not None:
        attributes["patch_size_level0"] = side
    return placed(store.path, lambda: corners, attributes)  # lazyslide's tiles lie in level-0 pixels


def _join(store: ZarrStore, region: str, table: ParquetTable, ids: NDArray) -> tuple[NDArray, float | None]:
    """([N, 2] x, y of each row's tile, edge of the tiles in level-0 pixels where all are one square)."""
    where = f"{store.path}: shapes/{region}"
    tile_ids = table.numbers("tile_id")
    packed = [part.to_pylist() for _, batch in table.batches(["geometry"]) for part in [batch.column(0)]]
    shapes = [one for part in packed for one in part]
    if any(not isinstance(one, bytes) or len(one) != BOX_BYTES for one in shapes):
        raise SlideError(f"{where}: geometry: found other shapes than rectangles, wanted lazyslide's tiles")
    boxes = np.frombuffer(b"".join(shapes), BOX)
    if not ((boxes["order"] == 1) & (boxes["kind"] == 3) & (boxes["rings"] == 1) & (boxes["points"] == 5)).all():
        raise SlideError(f"{where}: geometry: found other shapes than rectangles, wanted lazyslide's tiles")
    low, high = boxes["xy"].min(axis=1), boxes["xy"].max(axis=1)
    order = np.argsort(tile_ids, kind="stable")
    if len(np.unique(tile_ids)) < len(tile_ids) or len(np.unique(ids)) < len(ids):
        raise SlideError(f"{where}: tile_id: found one of them twice, wanted each once")
    at = np.searchsorted(tile_ids[order], ids).clip(max=max(0, len(order) - 1))
    if not len(order) or not (found := tile_ids[order][at] == ids).all():
        missing = ids[int(np.argmin(found))] if len(order) else ids[0]
        raise SlideError(f"{where}: found no tile with the tile_id {missing}, wanted one for each row of features")
    sides = np.unique(high - low)
    return low[order][at], float(sides[0]) if len(sides) == 1 else None
