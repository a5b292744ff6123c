"""Parquet feature files: one row a patch, the features in a column of lists or in columns of numbers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.feature_file import FeatureFile, check_matrix, listed, metadata_strings
from vllm_wsi.slides.identity import SlideIdentity

from .named_arrays import AXES, COORD_KEYS, FEATURE_KEYS, Array, find_coords
from .parquet_table import ParquetTable

if TYPE_CHECKING:
    import pyarrow as pa

SLIDE_KEYS = ("slide_id", "slide", "slide_name", "wsi_id", "wsi", "image_id", "filename", "file_name")
NUMBERED = re.compile(r"(.*?)(\d{1,5})")
ARROW_DTYPES = {"halffloat": "float16", "float": "float32", "double": "float64"}
MAX_DIM = 1 << 14  # columns, or numbers of one patch
NOTES = ("pandas", "ARROW:schema", "geo", "huggingface")  # of the schema's metadata: what other software needs


class ParquetRows:
    """Rows in the file's order, batch by batch; going back begins again at the row group."""

    near_rows = 1 << 10  # a batch is unpacked whole

    def __init__(self, table: ParquetTable, columns: Sequence[str], feature_dim: int, is_list: bool) -> None:
        self._table, self._columns, self._d, self._is_list = table, columns, feature_dim, is_list
        self._batches: Iterator[tuple[int, pa.RecordBatch]] | None = None
        self._first, self._rows = 0, np.empty((0, feature_dim))

    def read_into(self, start: int, out: NDArray) -> None:
        done = 0
        while done < len(out):
            row = start + done
            self._go_to(row)
            part = self._rows[row - self._first :][: len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)

    def _go_to(self, row: int) -> None:
        if self._batches is None or row < self._first:
            self._batches, self._first, self._rows = self._table.batches(self._columns, row), row, self._rows[:0]
        while row >= self._first + len(self._rows):
            found = next(self._batches, None)
            if found is None:
                raise SlideError(f"{self._table.path}: found the end of the table while reading row {row}, wanted more")
            if row < found[0] + found[1].num_rows:
                self._first, self._rows = found[0], self._matrix(*found)

    def _matrix(self, first: int, batch: pa.RecordBatch) -> NDArray:
        if not self._is_list:
            return np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
        return list_matrix(self._table.path, self._columns[0], batch.column(0), self._d, first)

    def close(self) -> None:
        self._batches = None
        self._table.close()


def open_parquet(path: Path, identity: SlideIdentity) -> FeatureFile:
    """Opens a table of one slide's patches; x, y are columns, or one of pairs."""
    table = ParquetTable(path)
    try:
        return _open(path, identity, table)
    except BaseException:
        table.close()
        raise


def _open(path: Path, identity: SlideIdentity, table: ParquetTable) -> FeatureFile:
    schema = table.schema
    lists = [name for name in FEATURE_KEYS if name in schema.names and _is_list(schema.field(name).type)]
    if len(lists) > 1:
        raise SlideError(f"{path}: found several sets of features ({', '.join(lists)}), wanted one")
    columns = lists or _numbered(path, schema)
    field = schema.field(columns[0])
    kind = field.type.value_type if lists else field.type
    d = _list_size(path, table, columns[0]) if lists else len(columns)
    key = columns[0] if lists else f"{columns[0]} .. {columns[-1]}"
    n, d = check_matrix(path, key, (table.num_rows, d), ARROW_DTYPES.get(str(kind), str(kind)))
    if d > MAX_DIM:
        raise SlideError(f"{path}: {key}: found {d} numbers a patch, wanted at most {MAX_DIM}")
    _check_one_slide(path, table)
    attributes = {
        name.decode("utf-8", "replace"): value
        for name, value in (schema.metadata or {}).items()
        if name.decode("utf-8", "replace") not in NOTES
    }
    coords = find_coords(path, _arrays(path, table, columns), n, attributes)
    return FeatureFile(
        str(path), "parquet", key, n, d, ARROW_DTYPES[str(kind)], ParquetRows(table, columns, d, bool(lists)), identity,
        metadata_strings(path, attributes), **coords.fields(), remarks=coords.remarks,
    )  # fmt: skip


def list_matrix(path: Path, key: str, lists: pa.Array, width: int, first: int = 0) -> NDArray:
    """[n, width] of an array of lists; `first` is the row of its first, as errors count."""
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    if not (same := lengths == width).all():  # a null has no length
        row = int(np.argmin(same))
        found = "nothing" if np.isnan(lengths[row]) else f"{int(lengths[row])} numbers"
        raise SlideError(f"{path}: {key}: found {found} in row {first + row}, wanted {width}")
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _list_size(path: Path, table: ParquetTable, column: str) -> int:
    """Of the first row; those that follow are checked as they are read."""
    for _, batch in table.batches([column]):
        if batch.num_rows:
            return len(batch.column(0)[0]) if batch.column(0)[0].is_valid else 0
    return 0


def _numbered(path: Path, schema: pa.Schema) -> list[str]:
    """Columns 0 .. d-1 (or 1 .. d) under one prefix, in the order of their numbers."""
    if len(schema.names) > MAX_DIM + 100:
        raise SlideError(f"{path}: found {len(schema.names)} columns, wanted at most {MAX_DIM}")
    runs: dict[str, dict[int, str]] = defaultdict(dict)
    for field in schema:
        match = NUMBERED.fullmatch(field.name)
        if match and str(field.type) in ARROW_DTYPES:
            runs[match[1]][int(match[2])] = field.name
    whole = {prefix: run for prefix, run in runs.items() if len(run) > 3 and max(run) - min(run) == len(run) - 1}
    if len(whole) != 1:
        found = (
            f"the columns {listed(schema.names)}" if not whole else f"several sets of features ({listed(whole)}0 ..)"
        )
        raise SlideError(f"{path}: found {found}, wanted a column of lists named 'features' or columns 0 .. d-1")
    ((_, run),) = whole.items()
    kinds = {str(schema.field(name).type) for name in run.values()}
    if len(kinds) > 1 or min(run) > 1:
        found = f"columns of {listed(kinds)}" if len(kinds) > 1 else f"a first column {run[min(run)]}"
        raise SlideError(f"{path}: found {found}, wanted columns 0 .. d-1 of one dtype")
    return [run[number] for number in sorted(run)]


def _check_one_slide(path: Path, table: ParquetTable) -> None:
    for name in SLIDE_KEYS:
        if name in table.schema.names:
            slides: set[object] = set()
            for _, batch in table.batches([name]):
                slides |= set(batch.column(0).unique().to_pylist()[:2])
                if len(slides) > 1:
                    raise SlideError(f"{path}: {name}: found patches of several slides, wanted one slide in a file")


def _arrays(path: Path, table: ParquetTable, features: Sequence[str]) -> dict[str, Array]:
    arrays = {}
    names = {name for pair in AXES for name in pair} | set(COORD_KEYS)
    for name in sorted(names & set(table.schema.names) - set(features)):
        kind = table.schema.field(name).type
        if _is_list(kind):
            dtype = str(kind.value_type)
            arrays[name] = Array((table.num_rows, 2), ARROW_DTYPES.get(dtype, dtype), partial(_pairs, path, name))
        else:
            dtype = str(kind)
            arrays[name] = Array((table.num_rows,), ARROW_DTYPES.get(dtype, dtype), partial(_column, path, name))
    return arrays


def _column(path: Path, name: str) -> NDArray:
    """Opened anew: the rows' own table stands somewhere in the file, or is closed."""
    table = ParquetTable(path)
    try:
        return table.numbers(name)
    finally:
        table.close()


def _pairs(path: Path, name: str) -> NDArray:
    table = ParquetTable(path)
    try:
        parts = [list_matrix(path, name, batch.column(0), 2, first) for first, batch in table.batches([name])]
        return table.whole(name, np.concatenate(parts) if parts else np.empty((0, 2)))
    finally:
        table.close()
