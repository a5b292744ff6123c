"""HDF5 feature files: TRIDENT, CLAM, UNI2, STAMP, Marugoto/MoPaDi, AtlasPatch and AnnData (.h5ad)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import h5py
import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError, WsiError
from vllm_wsi.slides.byte_source import ByteSource, NeedsWholeFile, local_path
from vllm_wsi.slides.feature_file import FeatureFile, check_matrix, listed, metadata_strings, shown
from vllm_wsi.slides.identity import SlideIdentity
from vllm_wsi.slides.units import (
    GRID_SAMPLE,
    LEVEL0_KEYS,
    STAMP_V1_SCALE,
    STAMP_V1_UM,
    coord_unit,
    one_unit,
    unit_remarks,
)

from .anndata_features import is_table, matrix_key, table_attributes, table_coords, table_shape
from .hdf5_access import Hdf5Access
from .hdf5_file import Hdf5Source, check_small, check_stored, damaged, dataset_rows, has, is_local, local_dataset
from .named_arrays import NO_COORDS

# Attribute names of the producers -> ours. TRIDENT's own names are ours already.
RENAMED = {
    "extractor": "encoder",
    "name": "slide_id",
    "level0_width": "width",
    "level0_height": "height",
    "patch_size_lv0": "patch_size_level0",
}


def open_hdf5(source: ByteSource, identity: SlideIdentity, encoder: str | None) -> FeatureFile:
    """Opens any of the field's h5 layouts; `encoder` chooses within AtlasPatch's group of features.

    Raises:
        NeedsWholeFile: the features lie in chunks, or are converted, and the file is not on this machine.
    """
    access = Hdf5Access(source)
    try:
        return access.use(lambda file: _open(access, file, identity, encoder))
    except (WsiError, NeedsWholeFile):
        raise
    except Exception as error:  # h5py raises KeyError, RuntimeError, TypeError and more where bytes are damaged
        raise damaged(source.name) from error


def _open(access: Hdf5Access, file: h5py.File, identity: SlideIdentity, encoder: str | None) -> FeatureFile:
    path = access.name
    tables = Hdf5Source(access, file)
    if is_table(tables):
        return _open_anndata(access, file, tables, identity)
    key, form = _find_features(path, file, encoder)
    features = local_dataset(path, file, key)
    if features.chunks is not None:
        local_path(access.source)
    shape: tuple[int, ...] = features.shape or ()  # None: HDF5's null dataspace
    n, d = check_matrix(path, key, shape, features.dtype.name)
    check_stored(path, key, features)

    remarks: list[str] = []
    attributes: dict[str, object] = dict(file.attrs)
    load_coords: Callable[[], NDArray] | None = None
    groups = [attributes, dict(features.attrs)]
    sample = np.empty((0, 2))
    if has(file, "coords"):
        dataset = local_dataset(path, file, "coords")
        groups.insert(1, dict(dataset.attrs))
        load_coords = _coords_loader(access, dataset, n)
        sample = np.asarray(dataset[..., :GRID_SAMPLE, :2]).reshape(-1, 2)
        if dataset.shape[-1] == 5 and not any(key in attributes for key in ("patch_size", *LEVEL0_KEYS)):
            attributes |= _atlas_size(dataset)
    else:
        remarks.append(NO_COORDS)
    one_unit(path, [_strings(path, group) for group in groups])
    attributes = attributes | {key: value for group in groups[1:] for key, value in group.items()}
    if form == "AtlasPatch":
        attributes.setdefault("encoder", key.split("/")[1])

    rows = dataset_rows(access.source, file, key, n, d)
    metadata = _strings(path, attributes)
    unit = None
    if load_coords is not None:
        stamp = form in ("STAMP", "Marugoto")
        unit = coord_unit(path, metadata, stamp, not stamp, sample)
        remarks += unit_remarks(unit)
        if unit is not None and unit.scale == STAMP_V1_SCALE and unit.source != "guess":
            metadata.setdefault("tile_size_um", f"{STAMP_V1_UM:g}")  # by the same rule of its reader
    return FeatureFile(
        name=path, format=f"{form} h5", key=key, num_patches=n, feature_dim=d,
        dtype=features.dtype.name, rows=rows, identity=identity, metadata=metadata,
        unit=unit, load_coords=load_coords, remarks=tuple(remarks),
    )  # fmt: skip


def _strings(path: str, attributes: Mapping[str, object]) -> dict[str, str]:
    said = {RENAMED.get(name, name): value for name, value in attributes.items() if not isinstance(value, h5py.Empty)}
    return metadata_strings(path, said)


def _atlas_size(coords: h5py.Dataset) -> dict[str, object]:
    """AtlasPatch's columns are x, y, width, height, level: the size as it was read, and of which level's pixels."""
    some = coords[:GRID_SAMPLE, 2:]
    if len(np.unique(some, axis=0)) != 1 or some[0, 0] != some[0, 1]:
        return {}
    return {"patch_size": int(some[0, 0]), "patch_level": int(some[0, 2])}


def _open_anndata(access: Hdf5Access, file: h5py.File, tables: Hdf5Source, identity: SlideIdentity) -> FeatureFile:
    key, attributes = matrix_key(tables), table_attributes(tables)
    if local_dataset(access.name, file, key).chunks is not None:
        local_path(access.source)
    n, d, dtype = table_shape(tables, key)
    coords = table_coords(tables, "", n, attributes)
    rows = dataset_rows(access.source, file, key, n, d)
    return FeatureFile(
        access.name, "AnnData h5ad", key, n, d, dtype, rows, identity, metadata_strings(access.name, attributes),
        **coords.fields(), remarks=coords.remarks,
    )  # fmt: skip


def _find_features(path: str, file: h5py.File, encoder: str | None) -> tuple[str, str]:
    """(key of the features, name of the layout)."""
    kind = file.get("features", getclass=True) if is_local(file, "features") else None
    if kind is h5py.Group:
        names = sorted(file["features"])
        if encoder is None and len(names) == 1:
            encoder = names[0]
        if encoder not in names:
            found = listed(names) or "nothing"
            asked = "one choice among them (#encoder=NAME)" if encoder is None else f"encoder {shown(encoder)!r}"
            raise SlideError(f"{path}: features: found a group of {found}, wanted {asked}")
        return f"features/{encoder}", "AtlasPatch"
    if has(file, "features"):
        if kind is h5py.Dataset and file["features"].ndim == 3:
            return "features", "UNI2"
        return "features", "TRIDENT" if is_local(file, "coords") and file["coords"].attrs else "CLAM"
    if has(file, "feats"):
        return "feats", "STAMP" if "stamp_version" in file.attrs or "unit" in file.attrs else "Marugoto"
    found = listed(file) or "no datasets"
    raise SlideError(f"{path}: found the keys {found}, wanted a dataset named 'features' or 'feats'")


def _coords_loader(access: Hdf5Access, dataset: h5py.Dataset, num_patches: int) -> Callable[[], NDArray]:
    shape: tuple[int, ...] = dataset.shape or ()
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or shape[0] != num_patches or shape[1] not in (2, 5) or dataset.dtype.kind not in "iuf":
        raise SlideError(
            f"{access.name}: coords: found {dataset.dtype} of shape {dataset.shape}, wanted one x, y for each of "
            f"{num_patches} patches"
        )
    check_small(access.name, "coords", shape)
    check_stored(access.name, "coords", dataset)
    return lambda: access.array("coords").reshape(shape)[:, :2]
