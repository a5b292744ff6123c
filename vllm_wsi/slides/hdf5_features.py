"""HDF5 feature files: TRIDENT, CLAM, UNI2, STAMP, Marugoto/MoPaDi and AtlasPatch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from .features import CoordUnit, FeatureFile, RowSource, SlideError, SlideIdentity, check_matrix, metadata_strings
from .rows import RawRows

MAX_CHUNK_BYTES = 64 << 20

# Attribute names of the producers -> ours. TRIDENT's own names are ours already.
RENAMED = {
    "extractor": "encoder",
    "name": "slide_id",
    "level0_width": "width",
    "level0_height": "height",
    "patch_size_lv0": "patch_size_level0",
}


def open_hdf5(path: Path, identity: SlideIdentity, encoder: str | None) -> FeatureFile:
    """Opens any of the field's h5 layouts; `encoder` chooses within AtlasPatch's group of features."""
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise _damaged(path) from error
    try:
        return _open(path, file, identity, encoder)
    except SlideError:
        file.close()
        raise
    except Exception as error:  # h5py raises KeyError, RuntimeError, TypeError and more where bytes are damaged
        file.close()
        raise _damaged(path) from error


def _damaged(path: Path) -> SlideError:
    return SlideError(
        f"{path}: found an HDF5 signature but no readable file, wanted HDF5; it is truncated, damaged or being written"
    )


class Hdf5Rows:
    """Rows of a chunked or compressed dataset, through the HDF5 library (which serves one thread at a time)."""

    def __init__(self, file: h5py.File, dataset: h5py.Dataset, path: Path) -> None:
        self._file, self._dataset, self._path = file, dataset, path
        self._lead = (0,) if dataset.ndim == 3 else ()

    def read_into(self, start: int, out: NDArray) -> None:
        if not len(out):
            return
        try:
            self._dataset.read_direct(out, np.s_[(*self._lead, slice(start, start + len(out)))])
        except OSError as error:
            raise SlideError(
                f"{self._path}: found unreadable rows from {start} on, wanted features; {error}"
            ) from error

    def close(self) -> None:
        self._file.close()


def _open(path: Path, file: h5py.File, identity: SlideIdentity, encoder: str | None) -> FeatureFile:
    key, form = _find_features(path, file, encoder)
    features = _local_dataset(path, file, key)
    shape: tuple[int, ...] = features.shape or ()  # None: HDF5's null dataspace
    n, d = check_matrix(path, key, shape, features.dtype.name)
    _check_stored(path, key, features)

    remarks: list[str] = []
    attributes: dict[str, object] = dict(file.attrs)
    unit: CoordUnit | None = None
    load_coords: Callable[[], NDArray] | None = None
    if _has(file, "coords"):
        dataset = _local_dataset(path, file, "coords")
        attributes |= dict(dataset.attrs)
        load_coords = _coords_loader(path, dataset, n)
        if dataset.shape[-1] == 5:  # AtlasPatch: x, y, width, height, level
            attributes.setdefault("patch_size_level0", dataset[0, 2])
        unit, remark = _coord_unit(dataset, attributes)
        remarks += [remark] if remark else []
    else:
        remarks.append("the file has no coords: kept patches have rows, but no place on the slide")
    attributes |= dict(features.attrs)
    if form == "AtlasPatch":
        attributes.setdefault("encoder", key.split("/")[1])

    rows: RowSource
    offset = features.id.get_offset()
    # Big-endian numbers, and small floats that h5py widens, are converted by the library.
    as_stored = features.id.get_type() == h5py.h5t.py_create(features.dtype.newbyteorder("<"))
    if offset is not None and file.userblock_size == 0 and as_stored:
        rows = RawRows(path, offset, features.dtype, n, d)
        file.close()
    else:
        rows = Hdf5Rows(file, features, path)
    metadata = metadata_strings(path, {RENAMED.get(name, name): value for name, value in attributes.items()})
    return FeatureFile(
        name=str(path), format=f"{form} h5", key=key, num_patches=n, feature_dim=d,
        dtype=features.dtype.name, rows=rows, identity=identity, metadata=metadata,
        coord_unit=unit, load_coords=load_coords, remarks=tuple(remarks),
    )  # fmt: skip


def _check_stored(path: Path, key: str, dataset: h5py.Dataset) -> None:
    """A dataset may claim more than was ever written, which HDF5 reads as fill values without end, or hold it in
    chunks so large that reading a few rows unpacks all of them."""
    if dataset.chunks is None:
        found, wanted = dataset.id.get_storage_size(), math.prod(dataset.shape) * dataset.id.get_type().get_size()
        if found < wanted:
            raise SlideError(
                f"{path}: {key}: found {found} of {wanted} bytes, wanted all; the file was not written whole"
            )
        return
    chunk_bytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise SlideError(
            f"{path}: {key}: found chunks of {chunk_bytes >> 20} MiB, wanted at most {MAX_CHUNK_BYTES >> 20}; "
            f"repack it once: h5repack -l {key}:CHUNK=1024x{dataset.shape[-1]} IN OUT"
        )
    wanted = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
    found = dataset.id.get_num_chunks()
    if found < wanted:
        raise SlideError(f"{path}: {key}: found {found} of {wanted} chunks, wanted all; the file was not written whole")


def _find_features(path: Path, file: h5py.File, encoder: str | None) -> tuple[str, str]:
    """(key of the features, name of the layout)."""
    kind = file.get("features", getclass=True) if _is_local(file, "features") else None
    if kind is h5py.Group:
        names = sorted(file["features"])
        if encoder is None and len(names) == 1:
            encoder = names[0]
        if encoder not in names:
            found = ", ".join(names) or "nothing"
            asked = "one choice among them (#encoder=NAME)" if encoder is None else f"encoder {encoder!r}"
            raise SlideError(f"{path}: features: found a group of {found}, wanted {asked}")
        return f"features/{encoder}", "AtlasPatch"
    if _has(file, "features"):
        if kind is h5py.Dataset and file["features"].ndim == 3:
            return "features", "UNI2"
        return "features", "TRIDENT" if _is_local(file, "coords") and file["coords"].attrs else "CLAM"
    if _has(file, "feats"):
        return "feats", "STAMP" if "stamp_version" in file.attrs or "unit" in file.attrs else "Marugoto"
    found = ", ".join(sorted(file)) or "no datasets"
    raise SlideError(f"{path}: found the keys {found}, wanted a dataset named 'features' or 'feats'")


def _has(file: h5py.File, key: str) -> bool:
    """Whether the root has that name, without following a link (`in` and `get` follow it)."""
    return file.id.links.exists(key.encode())


def _is_local(file: h5py.File, key: str) -> bool:
    return _has(file, key) and file.id.links.get_info(key.encode()).type == h5py.h5l.TYPE_HARD


def _local_dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    """The dataset, if it lies in this file: links and external storage could point at any file of the machine."""
    parts = key.split("/")
    for depth in range(1, len(parts) + 1):
        if not _is_local(file, "/".join(parts[:depth])):
            raise SlideError(f"{path}: {key}: found a link to elsewhere, wanted a dataset in this file")
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset):
        raise SlideError(f"{path}: {key}: found a {type(dataset).__name__.lower()}, wanted a dataset")
    if dataset.external or dataset.is_virtual:
        raise SlideError(f"{path}: {key}: found data stored in other files, wanted it in this file")
    return dataset


def _coords_loader(path: Path, dataset: h5py.Dataset, num_patches: int) -> Callable[[], NDArray]:
    shape: tuple[int, ...] = dataset.shape or ()
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or shape[0] != num_patches or shape[1] not in (2, 5) or dataset.dtype.kind not in "iuf":
        raise SlideError(
            f"{path}: coords: found {dataset.dtype} of shape {dataset.shape}, wanted one x, y for each of "
            f"{num_patches} patches"
        )
    _check_stored(path, "coords", dataset)

    def load() -> NDArray:
        try:
            with h5py.File(path, "r", locking=False) as file:
                return np.asarray(file["coords"][()]).reshape(shape)[:, :2]
        except (OSError, KeyError, ValueError) as error:
            raise SlideError(f"{path}: coords: found unreadable data, wanted coordinates; {error}") from error

    return load


def _coord_unit(coords: h5py.Dataset, attributes: dict[str, object]) -> tuple[CoordUnit, str | None]:
    """STAMP says «um»; without a word, whole numbers are level-0 pixels and fractions are microns."""
    unit = attributes.get("unit")
    if unit in ("um", b"um", "µm", "microns"):
        return "um", None
    if unit is not None or "patch_size_level0" in attributes or "level0_width" in attributes:
        return "px", None
    some = coords[..., :1000, :2]
    if np.array_equal(some, np.floor(some)):
        return "px", "coords: no attribute says their unit; taken as level-0 pixels because they are whole numbers"
    return "um", "coords: no attribute says their unit; taken as microns because they are fractions"
