"""A slide as data: a feature file with its header, its rows by range, its coordinates and its identity."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError, encodable
from vllm_wsi.files import write_atomically

from .identity import SlideIdentity

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),  # NumPy has no bfloat16: rows come as their raw 16 bits
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
}
"""Feature dtypes by name, and the NumPy dtype in which rows of each are read."""

CoordUnit = Literal["px", "um"]
Source = Literal["file", "format", "given", "guess"]
"""file: written in it; format: by the rule of what wrote it; given: by the user; guess: by the numbers alone."""


class Unit(NamedTuple):
    """Unit of a file's coordinates."""

    unit: CoordUnit
    source: Source
    scale: float = 1.0  # of `unit` in one of the file's numbers: 1000 where it writes millimetres

    def of(self, numbers: NDArray) -> NDArray:
        """The file's own numbers in `unit`."""
        return numbers if self.scale == 1.0 else numbers * self.scale


SPAN_BYTES = 4 << 20  # of rows that are read in one piece to pick some of them
MAX_METADATA = 1 << 16
MAX_ARRAY = 16  # numbers of an attribute that are kept one by one


class RowSource(Protocol):
    """Where a feature file's rows come from."""

    @property
    def near_rows(self) -> int:
        """Rows no further apart than this are read in one piece: to leave out what lies between would save nothing.
        1: only neighbours."""

    def read_into(self, start: int, out: NDArray) -> None:
        """Fills out [n, d], of the file's storage dtype, with the rows start .. start+n-1."""

    def close(self) -> None: ...


@dataclass
class FeatureFile:
    """An open feature file: N patches of d features each. Close it, or use it in a `with`.

    Neither features nor coordinates are read before they are asked for.
    """

    name: str  # as errors name it
    format: str  # "safetensors", "TRIDENT h5", ...
    key: str  # of the features within the file, "" where the format has none
    num_patches: int  # N
    feature_dim: int  # d
    dtype: str  # a key of FLOAT_DTYPES
    rows: RowSource = field(repr=False)
    identity: SlideIdentity
    metadata: Mapping[str, str] = field(default_factory=dict)
    unit: Unit | None = None  # None: the file has no coordinates, or nothing tells their unit
    load_coords: Callable[[], NDArray] | None = field(default=None, repr=False)  # [N, 2], the file's own numbers
    remarks: tuple[str, ...] = ()  # oddities that do not prevent use, for `doctor`
    choice: str | None = None  # the `encoder` that it was opened with

    @property
    def storage_dtype(self) -> np.dtype:
        return FLOAT_DTYPES[self.dtype]

    @property
    def coord_unit(self) -> CoordUnit | None:
        return None if self.unit is None else self.unit.unit

    @property
    def unit_source(self) -> Source | None:
        """Who says the unit."""
        return None if self.unit is None else self.unit.source

    def read_coords(self) -> NDArray | None:
        """[N, 2] x, y of each patch's top-left corner in `coord_unit` (px: level-0 pixels), or None.

        Where `coord_unit` is None they are the file's own numbers.

        Raises:
            SlideError: a patch has no finite place (NaN, infinity).
        """
        numbers = self.read_stored_coords()
        return numbers if numbers is None or self.unit is None else self.unit.of(numbers)

    def read_stored_coords(self) -> NDArray | None:
        """[N, 2] the file's own numbers of the places, whose unit may be a guess that a user corrects; or None.

        Raises:
            SlideError: a patch has no finite place (NaN, infinity).
        """
        coords = None if self.load_coords is None else self.load_coords()
        if coords is not None and not (finite := np.isfinite(coords).all(axis=1)).all():
            row = int(np.argmin(finite))
            raise SlideError(f"{self.name}: coords: found {coords[row].tolist()} in row {row}, wanted finite numbers")
        return coords

    def read_rows(self, start: int, stop: int, out: NDArray | None = None) -> NDArray:
        """Rows start .. stop-1.

        Args:
            out: a buffer of `storage_dtype` with at least stop-start rows of d; without one it is made.

        Returns:
            [stop-start, d] of `storage_dtype` (bfloat16 as its raw bits), a view of `out` where given.
        """
        if not 0 <= start <= stop <= self.num_patches:
            raise IndexError(f"{self.name}: rows {start}:{stop} asked of {self.num_patches}")
        n = stop - start
        if out is None:
            out = np.empty((n, self.feature_dim), self.storage_dtype)
        elif out.dtype != self.storage_dtype or out.shape[1:] != (self.feature_dim,) or len(out) < n:
            raise ValueError(
                f"{self.name}: found a buffer {out.dtype} {out.shape}, wanted {self.storage_dtype} of {n} rows"
            )
        self.rows.read_into(start, out[:n])
        return out[:n]

    def read_at(self, rows: NDArray) -> NDArray:
        """Chosen rows; of the others no more is read than their format and their distance make necessary.

        Args:
            rows: int [k], ascending and distinct.

        Returns:
            [k, d] of `storage_dtype` (bfloat16 as its raw bits).
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows[0] < 0 or rows[-1] >= self.num_patches or (np.diff(rows) < 1).any()):
            raise IndexError(f"{self.name}: found rows out of 0 .. {self.num_patches - 1} or out of order")
        out = np.empty((len(rows), self.feature_dim), self.storage_dtype)
        near = max(1, self.rows.near_rows)
        longest = max(near, SPAN_BYTES // (self.feature_dim * self.storage_dtype.itemsize), 1)
        ends = [*(np.flatnonzero(np.diff(rows) > near) + 1).tolist(), len(rows)] if len(rows) else []
        begin = 0
        for end in ends:
            while begin < end:
                first = int(rows[begin])
                stop = end if rows[end - 1] < first + longest else int(np.searchsorted(rows, first + longest))
                last = int(rows[stop - 1])
                if last - first < stop - begin:  # neighbours all
                    self.rows.read_into(first, out[begin:stop])
                else:
                    span = self.read_rows(first, last + 1)
                    np.take(span, rows[begin:stop] - first, axis=0, out=out[begin:stop])
                begin = stop
        return out

    def close(self) -> None:
        self.rows.close()

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_matrix(path: str | Path, key: str, shape: tuple[int, ...], dtype: str) -> tuple[int, int]:
    """(N, d) of (N, d) or of a batch of one slide (1, N, d); raises SlideError unless it is a float matrix of at least
    one patch."""
    where = f"{path}: {key}: found" if key else f"{path}: found"
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) >= 1 and shape[0] == 0:
        raise SlideError(f"{where} no patches (shape {shape}), wanted at least one; the slide may hold no tissue")
    if len(shape) == 1:
        raise SlideError(f"{where} shape {shape}, one vector for a whole slide, wanted patch features (N, d)")
    if len(shape) != 2 or min(shape) < 1:
        raise SlideError(f"{where} shape {shape}, wanted patch features (N, d)")
    if dtype not in FLOAT_DTYPES:
        raise SlideError(f"{where} dtype {shown(dtype)}, wanted one of {', '.join(FLOAT_DTYPES)}")
    return shape[0], shape[1]


def shown(text: object, length: int = 40) -> str:
    """A name that comes from a file, as an error may show it: short and on one line."""
    short = str(text)
    short = short if len(short) <= length else f"{short[:length]}..."
    return "".join(char if char.isprintable() else "?" for char in short)


def listed(names: Iterable[object], most: int = 8) -> str:
    """The keys of a file as an error lists them."""
    found = sorted(map(str, names))
    more = [f"and {len(found) - most} more"] if len(found) > most else []
    return ", ".join([*map(shown, found[:most]), *more])


def write_features(
    path: str | os.PathLike[str],
    features: NDArray,
    coords_px: NDArray | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes our own file: safetensors with `features`, `coords` and a string map of metadata.

    The file appears under its name only when it is whole.

    Args:
        features: [N, d] float16, float32 or float64; N and d at least 1.
        coords_px: [N, 2] whole numbers, x and y of the top-left corner in level-0 pixels.
        metadata: slide_id, encoder (id@revision), mpp, patch_size_level0, width, height and the like.
    """
    from safetensors.numpy import save

    path = Path(path)
    if features.ndim != 2 or 0 in features.shape or features.dtype.name not in ("float16", "float32", "float64"):
        raise SlideError(
            f"{path}: features: found {features.dtype} of shape {features.shape}, wanted float (N, d) with N, d > 0"
        )
    tensors = {"features": np.ascontiguousarray(features)}
    if coords_px is not None:
        coords = np.asarray(coords_px)
        if coords.shape != (len(features), 2) or not np.array_equal(coords, coords.astype(np.int32)):
            raise SlideError(
                f"{path}: coords: found {coords.dtype} of shape {coords.shape}, "
                f"wanted whole level-0 pixels of shape ({len(features)}, 2)"
            )
        tensors["coords"] = np.ascontiguousarray(coords, np.int32)
    for key, value in (metadata or {}).items():
        if not (isinstance(key, str) and isinstance(value, str)):
            found = f"{type(key).__name__} -> {type(value).__name__}"
            raise SlideError(f"{path}: metadata {key}: found {found}, wanted a string map")
    write_atomically(path, save(tensors, dict(metadata or {})))


def metadata_strings(path: str | Path, values: Mapping[str, object]) -> dict[str, str]:
    """Attributes as a string map: what a number or a NumPy scalar says, and JSON for the rest.

    Raises:
        SlideError: more than `MAX_METADATA` characters, which would be remembered with every selection.
    """
    plain: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1):
            value = value.item()
        if isinstance(value, np.ndarray) and value.size <= MAX_ARRAY:
            value = value.tolist()
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        plain[encodable(key)] = encodable(value if isinstance(value, str) else json.dumps(value, default=str))
    size = sum(len(key) + len(value) for key, value in plain.items())
    if size > MAX_METADATA:
        raise SlideError(f"{path}: metadata: found {size} characters, wanted at most {MAX_METADATA}")
    return plain
