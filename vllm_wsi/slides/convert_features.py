"""Any readable feature file to ours: the same numbers at the same places, quick to read by rows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.executors import Executor, LocalExecutor, Work
from vllm_wsi.files import replacing

from .feature_file import FLOAT_DTYPES, FeatureFile, metadata_strings
from .formats.dispatch import open_features
from .identity import SlideIdentity, is_store, read_record
from .many_slides import Outcome, crashed, place_slides, why_failed
from .slide_names import walk_features
from .units import KEPT_UNIT, KEPT_UNIT_SCALE, KEPT_UNIT_SOURCE, kept_metadata

SUMMARY = "convert_summary.csv"
SOURCE = "converted_from"  # metadata key: what the file was made of, and how
CHUNK_BYTES = 8 << 20
ST_DTYPES = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int16": "I16", "int32": "I32",
    "int64": "I64", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip
"""safetensors' names of the dtypes in which features and coordinates are written."""

Dtype = Literal["same", "float16"]


class Conversion(NamedTuple):
    """One feature file and the file of ours that becomes of it."""

    slide: Path
    out: Path


def find_conversions(paths: Sequence[Path], out: Path) -> list[Conversion]:
    """Feature files named singly or found below folders, each with its own place below `out`.

    Raises:
        SlideError: a folder holds no feature file or is `out` itself, two files would become one, or one itself.
    """

    def below(path: Path) -> list[Path] | None:
        if not path.is_dir() or is_store(path):
            return None
        if path.resolve() == out.resolve():
            raise SlideError(f"{path}: found the folder of the sources as --out, wanted another one")
        found = [one for one in walk_features(path) if not one.resolve().is_relative_to(out.resolve())]
        if not found:
            raise SlideError(f"{path}: found no feature files, wanted at least one")
        return found

    jobs = [Conversion(slide, place) for place, slide in place_slides(paths, out, below).items()]
    for job in jobs:
        if job.out.resolve() == job.slide.resolve():
            raise SlideError(f"{job.slide}: found the source's own place as the result's, wanted another --out")
    return jobs


def finished(job: Conversion, encoder: str | None, dtype: Dtype) -> Outcome | None:
    """What is told of a file that was made of the same source, in its present state, the same way; else None.

    Raises:
        SlideError: something else is there, or the source is not.
    """
    wanted = _record(SlideIdentity.of_file(job.slide), encoder, dtype)
    if not job.out.exists():
        return None
    with open_features(job.out) as there:
        if not (found := read_record(there.metadata.get(SOURCE))):
            raise SlideError(f"{job.out}: found other features there, wanted none; choose another --out")
        for key in ("name", "encoder", "dtype"):
            if (said := found.get(key)) != wanted[key]:
                found_there = f"found one made of {key} {said!r}, wanted {wanted[key]!r}"
                raise SlideError(f"{job.out}: {found_there}; choose another --out")
        if found != wanted:
            return None  # the source has changed since
        return Outcome(str(job.slide), "skipped", there.num_patches, reason="is there already")


def _record(identity: SlideIdentity, encoder: str | None, dtype: Dtype) -> dict[str, str | int | None]:
    """What a converted file says it was made of, and how; `encoder` is the choice among several sets of features."""
    return identity.record() | {"encoder": encoder, "dtype": dtype}


def convert(job: Conversion, encoder: str | None = None, dtype: Dtype = "same") -> int:
    """Writes features, coordinates and metadata of one file as safetensors, in chunks; returns the patches.

    The file appears under its name only when it is whole. Coordinates are written as they stand in the source,
    with their unit, its scale and who says it: a guess stays one, and can be corrected as in the source.

    Args:
        dtype: of the features; "same": as in the source, bfloat16 too (8-bit floats as they are read: float16).

    Raises:
        SlideError: the source cannot be read, changes meanwhile, or holds a value that float16 cannot hold.
    """
    with open_features(job.slide, encoder) as slide:
        coords = slide.read_stored_coords()
        kept = (KEPT_UNIT, KEPT_UNIT_SOURCE, KEPT_UNIT_SCALE)
        metadata = {key: value for key, value in slide.metadata.items() if key not in kept}
        metadata[SOURCE] = json.dumps(_record(slide.identity, encoder, dtype))
        if coords is not None:
            metadata |= kept_metadata(slide.unit)
        metadata = metadata_strings(job.slide, metadata)
        name = slide.dtype if dtype == "same" else dtype
        job.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(job.out) as file:
            _write(file, slide, name, None if coords is None else _storable(coords), metadata)
            slide.identity.refuse_change(job.slide)
        return slide.num_patches


def _storable(coords: NDArray) -> NDArray:
    """Little-endian, of a dtype that the reader knows; every value is kept."""
    if coords.dtype.kind in "iu" and coords.dtype.itemsize == 1:
        coords = coords.astype(np.int16)
    if coords.dtype.name not in ST_DTYPES:
        raise SlideError(f"coords: found dtype {coords.dtype}, wanted whole numbers or floats")
    return np.ascontiguousarray(coords, coords.dtype.newbyteorder("<"))


def _write(
    file: IO[bytes], slide: FeatureFile, dtype: str, coords: NDArray | None, metadata: Mapping[str, str]
) -> None:
    arrays = {"features": (FLOAT_DTYPES[dtype], ST_DTYPES[dtype], [slide.num_patches, slide.feature_dim])}
    if coords is not None:
        arrays["coords"] = coords.dtype, ST_DTYPES[coords.dtype.name], list(coords.shape)
    order = sorted(arrays, key=lambda name: -arrays[name][0].itemsize)  # so that all begin at a multiple of their width
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        storage, said, shape = arrays[name]
        end = offset + storage.itemsize * math.prod(shape)
        header[name] = {"dtype": said, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name in order:
        for block in [coords] if name == "coords" else _feature_blocks(slide, dtype):
            assert block is not None
            file.write(np.ascontiguousarray(block).view(np.uint8).data)


def _feature_blocks(slide: FeatureFile, dtype: str) -> Iterator[NDArray]:
    step = max(1, CHUNK_BYTES // (slide.feature_dim * slide.storage_dtype.itemsize))
    for start in range(0, slide.num_patches, step):
        rows = slide.read_rows(start, min(start + step, slide.num_patches))
        yield rows if dtype == slide.dtype else _as_float16(slide, rows)


def _as_float16(slide: FeatureFile, rows: NDArray) -> NDArray:
    values = (rows.astype(np.uint32) << 16).view(np.float32) if slide.dtype == "bfloat16" else rows
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    lost = np.isfinite(values) & ~np.isfinite(half)
    if lost.any():
        raise SlideError(
            f"{slide.name}: {slide.key or 'features'}: found {values[lost][0]:g}, wanted at most 65504 in float16; "
            "convert it without --dtype"
        )
    return half


def convert_many(
    jobs: Sequence[Conversion],
    encoder: str | None = None,
    dtype: Dtype = "same",
    executor: Executor | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Converts files; one that fails, or that takes its process down, stops no other.

    Args:
        executor: None: a process for each core.
        on_outcome: called as each file ends.

    Returns:
        In the order of the jobs.
    """
    outcomes: dict[Conversion, Outcome] = {}

    def end(job: Conversion, outcome: Outcome) -> None:
        outcomes[job] = outcome
        on_outcome(outcome)

    waiting = []
    for job in jobs:
        try:
            there = finished(job, encoder, dtype)
        except SlideError as error:
            there = Outcome(str(job.slide), "failed", reason=str(error))
        if there is None:
            waiting.append(job)
        else:
            end(job, there)
    work = Work(partial(_convert, encoder=encoder, dtype=dtype))
    for job, outcome in (executor or LocalExecutor()).run(work, waiting):
        end(job, outcome or Outcome(str(job.slide), "failed", reason=crashed(job.slide)))
    return [outcomes[job] for job in jobs]


def _convert(job: Conversion, encoder: str | None, dtype: Dtype) -> Outcome:
    began = time.perf_counter()
    try:
        num_patches = convert(job, encoder, dtype)
    except Exception as error:  # the other files go on
        return Outcome(str(job.slide), "failed", reason=why_failed(job.slide, error))
    return Outcome(str(job.slide), "done", num_patches, round(time.perf_counter() - began, 2))
