"""Feature files of torch.save, read by its restricted loader alone."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.byte_source import LocalBytes
from vllm_wsi.slides.feature_file import FeatureFile, RowSource, check_matrix, listed, metadata_strings
from vllm_wsi.slides.identity import SlideIdentity

from .named_arrays import Array, Coords, features_key, find_coords
from .npy_features import CONVERT
from .rows import ArrayRows, read_as, stored_array, stored_rows, widened
from .zip_records import data_offset, open_record

if TYPE_CHECKING:
    from torch import Tensor

LEGACY_TORCH_PICKLES = 4  # magic number, protocol, system, object; keys and raw storages follow
MAX_TENSOR_PICKLE = 1 << 16  # bytes; that of some tensors needs a few hundred
CODE = "pickled Python objects (TRIDENT's .pt holds a NumPy array)"
WANTED = "a tensor (N, d), or a dict of tensors with 'features' and 'coords'"
TENSOR_GLOBAL = re.compile(
    r"torch\._utils _rebuild_\w+|torch (\w+Storage|Size|device|\w*float\w*|u?int\d+|bool)|collections OrderedDict"
    r"|torch\.storage UntypedStorage|torch\.serialization _get_layout"
)
CONVERT_TORCH = CONVERT.format("torch.load(FILE, weights_only=False)")
CONVERT_TORCH_DICT = CONVERT.format('torch.load(FILE, weights_only=False)["KEY"]')


def open_torch_zip(path: Path, identity: SlideIdentity, records: Sequence[zipfile.ZipInfo]) -> FeatureFile:
    """A `.pt` of torch >= 1.6 is a zip of uncompressed records, one for each tensor."""
    for record in records:
        if record.filename.endswith("/data.pkl"):
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > MAX_TENSOR_PICKLE:
                raise SlideError(f"{path}: found {CODE}, wanted {WANTED}; {CONVERT_TORCH}")
            _refuse_code(path, io.BytesIO(_bytes(path, record)), 1)
        elif record.filename.endswith("/byteorder") and record.file_size < 64 and _bytes(path, record) != b"little":
            raise SlideError(f"{path}: found big-endian numbers, wanted little-endian ones")
    content = _torch_load(path)
    tensors, attributes = _content(path, content)
    places = _places(path, records, tensors)
    return _feature_file(path, "pt", identity, tensors, attributes, places)


def open_legacy_torch(path: Path, identity: SlideIdentity) -> FeatureFile:
    """A `.pt` of torch < 1.6 has no offsets: it is read whole, by the same restricted loader."""
    with open(path, "rb") as file:
        _refuse_code(path, file, LEGACY_TORCH_PICKLES)
    tensors, attributes = _content(path, _torch_load(path, mmap=False))
    return _feature_file(path, "pt (before torch 1.6)", identity, tensors, attributes, None)


def _feature_file(
    path: Path,
    form: str,
    identity: SlideIdentity,
    tensors: Mapping[str, Tensor],
    attributes: Mapping[str, object],
    places: Mapping[str, int] | None,
) -> FeatureFile:
    """`places`: where in the file each tensor's numbers begin; None: they were read with the file."""
    key = "" if list(tensors) == [""] else features_key(path, tensors)
    tensor = tensors[key]
    shape, dtype = tuple(tensor.shape), _dtype(tensor)
    n, d = check_matrix(path, key, shape, read_as(dtype))
    arrays = {
        name: Array(tuple(one.shape), _dtype(one), _loader(path, name, one, places))
        for name, one in tensors.items()
        if name != key
    }
    coords = find_coords(path, arrays, n, attributes)
    rows: RowSource
    if places is None:
        rows = ArrayRows(_numbers(tensor).reshape(n, d))
    else:
        rows = stored_rows(LocalBytes(path), places[key], dtype, n, d)
    return FeatureFile(
        str(path), form, key, n, d, read_as(dtype), rows, identity, metadata_strings(path, attributes),
        **coords.fields(), remarks=(*_slideflow(path, coords), *widened(key, dtype)),
    )  # fmt: skip


def _loader(path: Path, key: str, tensor: Tensor, places: Mapping[str, int] | None) -> Any:
    if places is None:
        return partial(_numbers, tensor)
    shape, dtype = tuple(tensor.shape), _dtype(tensor)

    def load() -> NDArray:
        with LocalBytes(path) as source:
            return stored_array(source, key, places[key], np.dtype(dtype), shape)

    return load


def _numbers(tensor: Tensor) -> NDArray:
    """What NumPy reads of a tensor in memory: bfloat16 by its raw bits."""
    import torch

    raw = tensor.detach().contiguous()
    return (raw.view(torch.uint16) if raw.dtype == torch.bfloat16 else raw).numpy()


def _slideflow(path: Path, coords: Coords) -> tuple[str, ...]:
    index = path.with_suffix(".index.npz")
    if coords.load is None and index.is_file():
        return (
            f"{index.name} beside it holds the centres of slideflow's tiles but not their size, so it is not read: "
            "kept patches have rows, but no place on the slide",
        )
    return coords.remarks


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _content(path: Path, content: object) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(tensors by name, "" for a single one; single values beside them)."""
    import torch

    if isinstance(content, torch.Tensor):
        content = {"": content}
    if not isinstance(content, dict):
        raise SlideError(f"{path}: found a {type(content).__name__}, wanted {WANTED}")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise SlideError(f"{path}: found a dict with the keys {listed(content) or 'of none'}, wanted {WANTED}")
    for key, tensor in tensors.items():
        where = f"{path}: {key}: " if key else f"{path}: "
        if tensor.layout is not torch.strided:
            raise SlideError(f"{where}found a {tensor.layout} tensor, wanted a dense one (N, d)")
        held, claimed = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.itemsize
        if claimed > held:  # an expanded tensor: a few bytes that stand for many rows
            raise SlideError(f"{where}found {held} bytes of {claimed}, wanted every number stored")
    values: dict[str, object] = {
        str(key): value for key, value in content.items() if isinstance(value, (str, int, float, bool))
    }
    return tensors, values


def _places(path: Path, records: Sequence[zipfile.ZipInfo], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Where in the file each tensor's numbers begin.

    torch keeps a tensor's record to itself, but maps the file: records and mapped storages have the same order and
    the same distances.
    """
    data = sorted((r for r in records if "/data/" in r.filename), key=lambda record: record.header_offset)
    storages = sorted(
        {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors.values()}.items()
    )
    stored = all(record.compress_type == zipfile.ZIP_STORED for record in data)
    if not stored or len(data) != len(storages) or any(not one.is_contiguous() for one in tensors.values()):
        raise SlideError(f"{path}: found {len(data)} records or a strided view, wanted one contiguous tensor in each")
    offsets = {}
    base = None
    for record, (pointer, size) in zip(data, storages, strict=True):
        offset = data_offset(path, record)
        base = pointer - offset if base is None else base
        if pointer - offset != base or record.file_size < size:
            raise SlideError(f"{path}: found a record of {record.file_size} bytes, wanted the size of its tensor")
        offsets[pointer] = offset
    return {
        key: offsets[one.untyped_storage().data_ptr()] + one.storage_offset() * one.element_size()
        for key, one in tensors.items()
    }


def _bytes(path: Path, record: zipfile.ZipInfo) -> bytes:
    with open_record(path, record) as file:
        return file.read()


def _refuse_code(path: Path, stream: IO[bytes], count: int) -> None:
    """Looks through pickles, without running them, for anything that a tensor does not need.

    The restricted loader behind this still calls a few builtins, such as `bytearray(10**12)`.
    """
    try:
        for _ in range(count):
            opcodes = pickletools.genops(stream)
            convert = CONVERT_TORCH
            for number, (opcode, argument, _) in enumerate(opcodes):
                if opcode.name == "EMPTY_DICT" and number == 1:
                    convert = CONVERT_TORCH_DICT
                is_name = opcode.name in ("GLOBAL", "INST")
                if opcode.name == "STACK_GLOBAL" or (is_name and not TENSOR_GLOBAL.fullmatch(str(argument))):
                    raise SlideError(f"{path}: found {CODE}, wanted {WANTED}; {convert}")
    except SlideError:
        raise
    except Exception as error:  # damaged bytes make pickletools trip over anything
        raise _unreadable(path) from error


def _unreadable(path: Path) -> SlideError:
    return SlideError(f"{path}: found an unreadable .pt file, wanted a tensor (N, d); it may be truncated")


def _torch_load(path: Path, mmap: bool = True) -> object:
    """The file's content; mapped, so that nothing is read of its tensors."""
    import pickle

    import torch

    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except pickle.UnpicklingError as error:
        raise SlideError(f"{path}: found {CODE}, wanted {WANTED}; {CONVERT_TORCH}") from error
    except Exception as error:  # torch raises whatever a damaged file makes it trip over
        raise _unreadable(path) from error
