"""Opens every feature format of the field; what a file is, is decided by its first bytes, not by its name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import re
import struct
import tokenize
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .csv_features import open_csv
from .features import FLOAT_DTYPES, CoordUnit, FeatureFile, SlideError, SlideIdentity, check_matrix, metadata_strings
from .hdf5_features import open_hdf5
from .rows import ArrayRows, RawRows

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = b"PK\x03\x04"
PICKLE_PROTOCOLS = tuple(bytes([0x80, n]) for n in range(2, 6))
LEGACY_TORCH_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # most slide images: svs, ndpi, scn, OME-TIFF ...
NON_TIFF_SUFFIXES = frozenset((".mrxs", ".czi", ".dcm", ".vms", ".vmu"))  # of slide images whose first bytes say little
# Of the slide images that a folder is searched for or a benchmark names; what a file is, its content says.
IMAGE_SUFFIXES = NON_TIFF_SUFFIXES | {".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".svslide", ".qptiff"}
QC_SUFFIX = ".qc.png"  # of the pictures that `encode --qc` draws of tissue and patches
MAX_SAFETENSORS_HEADER = 1 << 20  # bytes; two tensors and their metadata need a few hundred
MAX_TENSOR_PICKLE = 1 << 16  # bytes; that of one tensor needs a few hundred
SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
CONVERT = 'convert it once, where you trust the file: numpy.save("features.npy", numpy.asarray({}, "float32"))'
CODE = "pickled Python objects (TRIDENT's .pt holds a NumPy array)"
TENSOR_GLOBAL = re.compile(
    r"torch\._utils _rebuild_\w+|torch (\w+Storage|Size|device|\w*float\w*)|collections OrderedDict"
    r"|torch\.serialization _get_layout"
)
LEGACY_TORCH_PICKLES = 4  # magic number, protocol, system, object; keys and raw storages follow
CONVERT_TORCH = CONVERT.format("torch.load(FILE, weights_only=False)")
CONVERT_PICKLE = CONVERT.format('pickle.load(open(FILE, "rb"))')
CONVERT_NPY = CONVERT.format("numpy.load(FILE, allow_pickle=True)")
CONVERT_NPY_DICT = CONVERT.format('numpy.load(FILE, allow_pickle=True).item()["KEY"]')
CONVERT_NPZ = CONVERT.format('numpy.load(FILE)["KEY"]')


def open_features(path: str | os.PathLike[str], encoder: str | None = None) -> FeatureFile:
    """Opens a feature file; reads its header alone.

    Args:
        path: safetensors (ours), h5 (TRIDENT, CLAM, UNI2, STAMP, Marugoto, AtlasPatch), npy, pt or SlideChat csv.
        encoder: which encoder's features to take from a file that holds several (AtlasPatch).

    Raises:
        SlideError: in one sentence, what is wrong with the file and what was wanted.
    """
    path = Path(path)
    identity = SlideIdentity.of_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        if not head:
            raise SlideError(f"{path}: found an empty file, wanted a feature file")
        opened = _open_by_content(path, head, identity, encoder)
    except OSError as error:
        raise SlideError(f"{path}: found an unreadable file ({error}), wanted a feature file") from error
    if encoder is not None and opened.format != "AtlasPatch h5":
        opened.close()
        raise SlideError(f"{path}: found one set of features ({opened.format}), wanted a choice for encoder={encoder}")
    return opened


def features_in_memory(array: NDArray, name: str = "features", dtype: str | None = None) -> FeatureFile:
    """A feature file that is an array [N, d]; `dtype="bfloat16"` says that a uint16 array is raw bfloat16."""
    dtype = dtype or str(array.dtype)
    n, d = check_matrix(name, "", array.shape, dtype)
    array = np.ascontiguousarray(array)
    digest = hashlib.blake2b(f"{dtype}{array.shape}".encode(), digest_size=20)
    digest.update(array.view(np.uint8).data)
    identity = SlideIdentity(f"memory:{digest.hexdigest()}", array.nbytes)
    return FeatureFile(name, "array", "", n, d, dtype, ArrayRows(array), identity)


def _open_by_content(path: Path, head: bytes, identity: SlideIdentity, encoder: str | None) -> FeatureFile:
    if head.startswith(HDF5_MAGIC):
        return open_hdf5(path, identity, encoder)
    if head.startswith(NPY_MAGIC):
        return _open_npy(path, identity)
    if head.startswith(ZIP_MAGIC):
        return _open_zip(path, identity)
    if head.startswith(LEGACY_TORCH_MAGIC):
        return _open_legacy_torch(path, identity)
    if head.startswith(PICKLE_PROTOCOLS):
        raise SlideError(
            f"{path}: found a pickle, which can run code when it is loaded, wanted features; {CONVERT_PICKLE}"
        )
    if len(head) > 8 and head[8:9] == b"{" and head[5:8] == bytes(3):
        return _open_safetensors(path, identity)
    if path.suffix.lower() == ".csv":
        return open_csv(path, identity)
    if is_image(path, head):
        raise SlideError(
            f"{path}: found a slide image, wanted features; encode it once: vllm-wsi encode {path.name} --encoder NAME"
        )
    kind = "text" if _is_text(head) else "unknown content"
    wanted = "safetensors, h5, npy, pt or csv"
    raise SlideError(f"{path}: found {kind} that begins with {head[:12]!r}, wanted a feature file ({wanted})")


def is_image(path: Path, head: bytes) -> bool:
    """Whether that is a slide image, by its first bytes, or by its name where those say nothing."""
    return head.startswith(TIFF_MAGIC) or path.suffix.lower() in NON_TIFF_SUFFIXES


def _is_text(head: bytes) -> bool:
    try:
        return head.decode("utf-8", "strict").isprintable() or b"\n" in head
    except UnicodeDecodeError:
        return False


def _open_safetensors(path: Path, identity: SlideIdentity) -> FeatureFile:
    # The header is parsed here because the library offers no byte offsets, and its own reader maps the file.
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        if size > MAX_SAFETENSORS_HEADER:
            raise SlideError(f"{path}: found a header of {size} bytes, wanted at most {MAX_SAFETENSORS_HEADER}")
        raw = file.read(size)
        if len(raw) < size:
            raise SlideError(f"{path}: found {identity.size} bytes, wanted a header of {size}; the file is truncated")
        try:
            header = json.loads(raw)
            metadata = metadata_strings(path, header.pop("__metadata__", {}))
            entry = header.get("features")
            if entry is None:
                found = ", ".join(sorted(header)) or "no tensors"
                raise SlideError(f"{path}: found the keys {found}, wanted a tensor named 'features'")
            dtype = SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])
            shape, (begin, end) = whole_numbers(entry["shape"]), whole_numbers(entry["data_offsets"])
            n, d = check_matrix(path, "features", shape, dtype)
            storage = FLOAT_DTYPES[dtype]
            data = 8 + size
            if begin < 0 or end - begin != n * d * storage.itemsize:
                raise SlideError(f"{path}: features: found offsets {begin}:{end}, wanted the size of shape {shape}")
            load_coords = _safetensors_coords(path, header.get("coords"), data, n)
        except SlideError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SlideError(f"{path}: found a broken safetensors header, wanted JSON with offsets") from error
    rows = RawRows(path, data + begin, storage, n, d)
    unit: CoordUnit | None = None if load_coords is None else "px"
    return FeatureFile(str(path), "safetensors", "features", n, d, dtype, rows, identity, metadata, unit, load_coords)


def whole_numbers(values: object) -> tuple[int, ...]:
    """A JSON list of whole numbers; 40.0 and true are none."""
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ValueError(f"found {values!r}, wanted whole numbers")
    return tuple(values)


def _safetensors_coords(path: Path, entry: Mapping | None, data: int, num_patches: int) -> Callable[[], NDArray] | None:
    if entry is None:
        return None
    dtypes = {"I32": "<i4", "I64": "<i8"}
    shape, (begin, end) = whole_numbers(entry["shape"]), whole_numbers(entry["data_offsets"])
    if shape != (num_patches, 2) or entry["dtype"] not in dtypes:
        raise SlideError(
            f"{path}: coords: found {entry['dtype']} of shape {shape}, wanted I32 of shape ({num_patches}, 2)"
        )
    dtype, count = np.dtype(dtypes[entry["dtype"]]), num_patches * 2
    if begin < 0 or end - begin != count * dtype.itemsize:
        raise SlideError(f"{path}: coords: found offsets {begin}:{end}, wanted the size of shape {shape}")

    def load() -> NDArray:
        coords = np.fromfile(path, dtype, count, offset=data + begin)
        if coords.size < count:
            raise SlideError(f"{path}: coords: found {coords.size} numbers, wanted {count}; the file is truncated")
        return coords.reshape(shape)

    return load


def _open_npy(path: Path, identity: SlideIdentity) -> FeatureFile:
    with open(path, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
        except (ValueError, SyntaxError, tokenize.TokenError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise SlideError(f"{path}: found a broken npy header ({reason}), wanted features (N, d)") from error
        offset = file.tell()
    if dtype.hasobject:
        convert = CONVERT_NPY if shape else CONVERT_NPY_DICT
        raise SlideError(f"{path}: found a pickled Python object, wanted a float array (N, d); {convert}")
    n, d = check_matrix(path, "", shape, dtype.name)
    if fortran or dtype.byteorder == ">":
        raise SlideError(f"{path}: found Fortran or big-endian order, wanted numpy.ascontiguousarray's little-endian")
    rows = RawRows(path, offset, dtype, n, d)
    return FeatureFile(str(path), "npy", "", n, d, dtype.name, rows, identity)


class _Stored(NamedTuple):
    offset: int
    size: int


def _open_zip(path: Path, identity: SlideIdentity) -> FeatureFile:
    """A `.pt` of torch >= 1.6 is a zip of uncompressed records."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            records = [r for r in archive.infolist() if "/data/" in r.filename and not r.is_dir()]
            stored = [_Stored(_data_offset(path, r), r.file_size) for r in records if r.compress_type == 0]
            pickles = [r for r in archive.infolist() if r.filename.endswith("/data.pkl")]
            for record in pickles:
                if record.compress_type != 0 or record.file_size > MAX_TENSOR_PICKLE:
                    raise SlideError(f"{path}: found {CODE}, wanted a plain tensor (N, d); {CONVERT_TORCH}")
                _refuse_code(path, io.BytesIO(archive.read(record)), 1)
    except SlideError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise SlideError(f"{path}: found a broken zip archive, wanted a .pt tensor; it may be truncated") from error
    if not pickles:
        convert = f"; {CONVERT_NPZ}" if any(name.endswith(".npy") for name in names) else ""
        raise SlideError(f"{path}: found a zip archive of {', '.join(names[:3])}, wanted a .pt tensor{convert}")
    tensor = _torch_load(path, map_location="meta", mmap=True)
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    n, d = check_matrix(path, "", shape, dtype)
    storage = FLOAT_DTYPES[dtype]
    if len(stored) != 1 or not tensor.is_contiguous():
        raise SlideError(f"{path}: found {len(records)} records or a strided view, wanted one contiguous tensor")
    if stored[0].size < (tensor.storage_offset() + tensor.numel()) * storage.itemsize:
        raise SlideError(f"{path}: found a record of {stored[0].size} bytes, wanted the size of shape {shape}")
    offset = stored[0].offset + tensor.storage_offset() * storage.itemsize
    return FeatureFile(str(path), "pt", "", n, d, dtype, RawRows(path, offset, storage, n, d), identity)


def _data_offset(path: Path, record: zipfile.ZipInfo) -> int:
    """Where a zip record's bytes begin: behind its local header, whose length only the file itself tells."""
    with open(path, "rb") as file:
        file.seek(record.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return record.header_offset + 30 + name + extra


def _open_legacy_torch(path: Path, identity: SlideIdentity) -> FeatureFile:
    """A `.pt` of torch < 1.6 has no offsets: it is read whole, by the same restricted loader."""
    with open(path, "rb") as file:
        _refuse_code(path, file, LEGACY_TORCH_PICKLES)
    tensor = _torch_load(path, map_location="cpu")
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    n, d = check_matrix(path, "", shape, dtype)
    import torch

    raw = tensor.detach().contiguous()
    rows = ArrayRows((raw.view(torch.uint16) if dtype == "bfloat16" else raw).numpy())
    return FeatureFile(str(path), "pt (before torch 1.6)", "", n, d, dtype, rows, identity)


def _refuse_code(path: Path, stream: IO[bytes], count: int) -> None:
    """Looks through pickles, without running them, for anything that a tensor does not need.

    The restricted loader behind this still calls a few builtins, such as `bytearray(10**12)`.
    """
    try:
        for _ in range(count):
            for opcode, argument, _ in pickletools.genops(stream):
                is_name = opcode.name in ("GLOBAL", "INST")
                if opcode.name == "STACK_GLOBAL" or (is_name and not TENSOR_GLOBAL.fullmatch(str(argument))):
                    raise SlideError(f"{path}: found {CODE}, wanted a plain tensor (N, d); {CONVERT_TORCH}")
    except SlideError:
        raise
    except Exception as error:  # damaged bytes make pickletools trip over anything
        raise SlideError(
            f"{path}: found an unreadable .pt file, wanted a tensor (N, d); it may be truncated"
        ) from error


def _torch_load(path: Path, **how: object):
    import pickle

    import torch

    try:
        tensor = torch.load(path, weights_only=True, **how)
    except pickle.UnpicklingError as error:
        raise SlideError(f"{path}: found {CODE}, wanted a plain tensor (N, d); {CONVERT_TORCH}") from error
    except Exception as error:  # torch raises whatever a damaged file makes it trip over
        raise SlideError(
            f"{path}: found an unreadable .pt file, wanted a tensor (N, d); it may be truncated"
        ) from error
    if isinstance(tensor, torch.Tensor) and tensor.layout is not torch.strided:
        raise SlideError(f"{path}: found a {tensor.layout} tensor, wanted a dense one (N, d)")
    if not isinstance(tensor, torch.Tensor):
        keys = f" with the keys {', '.join(map(str, list(tensor)[:5]))}" if isinstance(tensor, dict) else ""
        raise SlideError(f"{path}: found a {type(tensor).__name__}{keys}, wanted one tensor (N, d)")
    return tensor
