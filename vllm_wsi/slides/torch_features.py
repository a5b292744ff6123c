"""Feature files of torch.save, read by its restricted loader alone."""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

from .features import FLOAT_DTYPES, FeatureFile, SlideError, SlideIdentity, check_matrix
from .npy_features import CONVERT, CONVERT_NPZ
from .rows import ArrayRows, RawRows

LEGACY_TORCH_PICKLES = 4  # magic number, protocol, system, object; keys and raw storages follow
MAX_TENSOR_PICKLE = 1 << 16  # bytes; that of one tensor needs a few hundred
CODE = "pickled Python objects (TRIDENT's .pt holds a NumPy array)"
TENSOR_GLOBAL = re.compile(
    r"torch\._utils _rebuild_\w+|torch (\w+Storage|Size|device|\w*float\w*)|collections OrderedDict"
    r"|torch\.serialization _get_layout"
)
CONVERT_TORCH = CONVERT.format("torch.load(FILE, weights_only=False)")


class _Stored(NamedTuple):
    offset: int
    size: int


def open_torch_zip(path: Path, identity: SlideIdentity) -> FeatureFile:
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


def open_legacy_torch(path: Path, identity: SlideIdentity) -> FeatureFile:
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
