"""Opens every feature format of the field; what a file is, is decided by its first bytes, not by its name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.files import NON_TIFF_SUFFIXES
from vllm_wsi.slides.byte_source import ByteSource, LocalBytes, local_path, read_bytes
from vllm_wsi.slides.feature_file import FeatureFile, check_matrix
from vllm_wsi.slides.identity import SlideIdentity

from .csv_features import open_csv
from .hdf5_features import open_hdf5
from .npy_features import CONVERT, open_npy
from .npz_features import open_npz
from .parquet_features import open_parquet
from .rows import ArrayRows
from .safetensors_features import open_safetensors
from .torch_features import open_legacy_torch, open_torch_zip
from .zarr_features import open_zarr
from .zip_records import zip_records

HEAD_BYTES = 64
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
NPY_MAGIC = b"\x93NUMPY"
PARQUET_MAGIC = b"PAR1"
ZIP_MAGIC = b"PK\x03\x04"
PICKLE_PROTOCOLS = tuple(bytes([0x80, n]) for n in range(2, 6))
LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # most slide images: svs, ndpi, scn, OME-TIFF ...
PICTURE_MAGIC = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
SEVERAL_SETS = ("AtlasPatch h5", "SpatialData zarr")  # formats that hold features of several encoders
WANTED = "safetensors, h5, h5ad, npy, npz, pt, parquet, zarr or csv"
CONVERT_PICKLE = CONVERT.format('pickle.load(open(FILE, "rb"))')


def open_features(path: str | os.PathLike[str], encoder: str | None = None) -> FeatureFile:
    """Opens a feature file; reads its header alone.

    Args:
        path: safetensors (ours), h5 (TRIDENT, CLAM, UNI2, STAMP, Marugoto, AtlasPatch), h5ad, zarr (SpatialData,
            AnnData, tiatoolbox), npy, npz, pt, parquet or SlideChat csv.
        encoder: which encoder's features to take from a file that holds several (AtlasPatch, SpatialData).

    Raises:
        SlideError: in one sentence, what is wrong with the file and what was wanted.
    """
    path = Path(path)
    identity = SlideIdentity.of_file(path)
    try:
        if identity.content:
            opened = open_zarr(path, identity, encoder)
        else:
            opened = open_source(LocalBytes(path), identity, encoder)
    except OSError as error:
        raise SlideError(f"{path}: found an unreadable file ({error}), wanted a feature file") from error
    return _chosen(opened, encoder)


def open_source(source: ByteSource, identity: SlideIdentity, encoder: str | None = None) -> FeatureFile:
    """The same, of a file that perhaps lies elsewhere. The feature file closes the source; so does an error.

    Raises:
        SlideError: as `open_features`.
        NeedsWholeFile: its format is read from a file of this machine alone.
    """
    try:
        if not source.size:
            raise SlideError(f"{source.name}: found an empty file, wanted a feature file")
        head = read_bytes(source, 0, HEAD_BYTES)
        if head.startswith(HDF5_MAGIC):
            return _chosen(open_hdf5(source, identity, encoder), encoder)
        if head.startswith(NPY_MAGIC):
            return _chosen(open_npy(source, identity), encoder)
        if len(head) > 8 and head[8:9] == b"{" and head[5:8] == bytes(3):
            return _chosen(open_safetensors(source, identity), encoder)
        opened = _open_local(local_path(source), head, identity)
    except BaseException:
        source.close()
        raise
    source.close()
    return _chosen(opened, encoder)


def _chosen(opened: FeatureFile, encoder: str | None) -> FeatureFile:
    if encoder is not None and opened.format not in SEVERAL_SETS:
        opened.close()
        raise SlideError(
            f"{opened.name}: found one set of features ({opened.format}), wanted a choice for encoder={encoder}"
        )
    opened.choice = encoder
    return opened


def features_in_memory(array: NDArray, name: str = "features", dtype: str | None = None) -> FeatureFile:
    """A feature file that is an array [N, d] or [1, N, d]; `dtype="bfloat16"`: a uint16 array is raw bfloat16."""
    dtype = dtype or str(array.dtype)
    n, d = check_matrix(name, "", array.shape, dtype)
    array = np.ascontiguousarray(array).reshape(n, d)
    digest = hashlib.blake2b(f"{dtype}{array.shape}".encode(), digest_size=20)
    digest.update(array.view(np.uint8).data)
    identity = SlideIdentity(f"memory:{digest.hexdigest()}", array.nbytes)
    return FeatureFile(name, "array", "", n, d, dtype, ArrayRows(array), identity)


def _open_local(path: Path, head: bytes, identity: SlideIdentity) -> FeatureFile:
    if head.startswith(ZIP_MAGIC):
        return _open_zip(path, identity)
    if head.startswith(LEGACY_TORCH_MAGIC):
        return open_legacy_torch(path, identity)
    if head.startswith(PICKLE_PROTOCOLS):
        raise SlideError(
            f"{path}: found a pickle, which can run code when it is loaded, wanted features; {CONVERT_PICKLE}"
        )
    if head.startswith(PARQUET_MAGIC):
        return open_parquet(path, identity)
    if path.suffix.lower() == ".csv":
        return open_csv(path, identity)
    if (picture := _picture(head)) is not None:
        raise SlideError(
            f"{path}: found a {picture} picture, wanted the features of a slide; pictures are not read here: "
            "encode the slide once (vllm-wsi encode SLIDE --encoder NAME) and send its feature file"
        )
    if is_image(path, head):
        raise SlideError(
            f"{path}: found a slide image, wanted features; encode it once: vllm-wsi encode SLIDE --encoder NAME"
        )
    kind = "text" if _is_text(head) else "unknown content"
    raise SlideError(f"{path}: found {kind}, wanted a feature file ({WANTED})")  # shows nothing of what it holds


def _open_zip(path: Path, identity: SlideIdentity) -> FeatureFile:
    """`.pt` and `.npz` are zip archives both."""
    records = zip_records(path)
    if any(record.filename.endswith("/data.pkl") for record in records):
        return open_torch_zip(path, identity, records)
    if any(record.filename.endswith(".npy") for record in records):
        return open_npz(path, identity, records)
    raise SlideError(f"{path}: found a zip archive of other things, wanted a feature file ({WANTED})")


def is_image(path: Path, head: bytes) -> bool:
    """Whether that is a slide image, by its first bytes, or by its name where those say nothing."""
    return head.startswith(TIFF_MAGIC) or path.suffix.lower() in NON_TIFF_SUFFIXES


def _picture(head: bytes) -> str | None:
    """The kind of an ordinary picture, as chat clients send them, by its first bytes."""
    for magic, kind in PICTURE_MAGIC.items():
        if head.startswith(magic):
            return kind
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"avif"):
        return "HEIF"
    return "BMP" if head.startswith(b"BM") and head[6:10] == bytes(4) else None


def _is_text(head: bytes) -> bool:
    try:
        return head.decode("utf-8", "strict").isprintable() or b"\n" in head
    except UnicodeDecodeError:
        return False
