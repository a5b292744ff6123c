"""Columns of a parquet file, in batches; what a file claims is bounded before it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError

from .zarr_codecs import EXTRA

if TYPE_CHECKING:
    import pyarrow as pa

MAX_FOOTER = 16 << 20  # bytes of the schema and the places of all columns, by the file's last bytes
MAX_ROWS = 1 << 24
BATCH_ROWS = 4096


class ParquetTable:
    """An open parquet file. Raises SlideError where it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise SlideError(f"{path}: found a parquet file but no pyarrow; {EXTRA}") from error
        self._check_footer()
        try:
            self._file = pq.ParquetFile(path, memory_map=False, pre_buffer=False)
            self.schema: pa.Schema = self._file.schema_arrow
            self.num_rows: int = self._file.metadata.num_rows
        except (OSError, ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise self.broken() from error
        if not 0 <= self.num_rows <= MAX_ROWS:
            self.close()
            raise SlideError(f"{path}: found {self.num_rows} rows, wanted at most {MAX_ROWS}")

    def batches(self, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(first row, batch) from the row group on that holds row `start`."""
        meta, first, group = self._file.metadata, 0, 0
        while group < meta.num_row_groups - 1 and first + meta.row_group(group).num_rows <= start:
            first += meta.row_group(group).num_rows
            group += 1
        try:
            for batch in self._file.iter_batches(
                BATCH_ROWS, list(range(group, meta.num_row_groups)), list(columns), use_threads=False
            ):
                yield first, batch
                first += batch.num_rows
        except (OSError, ValueError, NotImplementedError) as error:
            raise self.broken() from error

    def numbers(self, column: str) -> NDArray:
        """[num_rows] of a column of numbers; nulls are NaN."""
        parts = [batch.column(0).to_numpy(zero_copy_only=False) for _, batch in self.batches([column])]
        return self.whole(column, np.concatenate(parts) if parts else np.empty(0))

    def whole(self, column: str, values: Any) -> Any:
        """The values, if there is one for each row."""
        if len(values) != self.num_rows:
            raise SlideError(f"{self.path}: {column}: found {len(values)} values, wanted {self.num_rows}")
        return values

    def broken(self) -> SlideError:
        return SlideError(f"{self.path}: found an unreadable parquet file, wanted a table; it may be truncated")

    def close(self) -> None:
        self._file.close()

    def _check_footer(self) -> None:
        with open(self.path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 8))
            tail = file.read(8)
        footer = int.from_bytes(tail[:4], "little")
        if size < 12 or tail[4:] != b"PAR1" or footer > size - 12:
            raise self.broken()
        if footer > MAX_FOOTER:
            raise SlideError(f"{self.path}: found a footer of {footer} bytes, wanted at most {MAX_FOOTER}")
