"""SlideChat's feature files: CSV with a header row, d columns of features, then the patch's name."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.feature_file import FeatureFile
from vllm_wsi.slides.identity import SlideIdentity

SCAN_BYTES = 1 << 22


class CsvRows:
    """Rows of a CSV file, found again by the byte at which each line begins."""

    near_rows = 1  # a line that is not wanted is not parsed

    def __init__(self, path: Path, line_starts: NDArray, feature_dim: int) -> None:
        self._path, self._starts, self._d = path, line_starts, feature_dim
        self._file = open(path, "rb")

    def read_into(self, start: int, out: NDArray) -> None:
        for i in range(len(out)):
            begin, end = self._starts[start + i : start + i + 2]
            self._file.seek(begin)
            cells = self._file.read(end - begin).rstrip(b"\r\n").split(b",")
            try:
                if len(cells) <= self._d:
                    raise ValueError("the line is cut short")
                out[i] = _numbers(cells[: self._d])
            except ValueError as error:
                found = "a blank line" if cells == [b""] else f"{len(cells)} cells"
                raise SlideError(
                    f"{self._path}: line {start + i + 2}: found {found}, wanted {self._d} numbers and a name"
                ) from error

    def close(self) -> None:
        self._file.close()


def _numbers(cells: list[bytes]) -> list[float]:
    try:
        return list(map(float, cells))
    except ValueError:  # quoted
        return [float(cell.strip(b'" ')) for cell in cells]


def open_csv(path: Path, identity: SlideIdentity) -> FeatureFile:
    """Opens a SlideChat CSV. Its N is in no header: the file is scanned once for line ends.

    The names of the last column are grid indices, not pixels, so such a file has no coordinates.
    """
    with open(path, "rb") as file:
        header = header_cells(file)
    feature_dim = next((i for i, cell in enumerate(header) if cell != str(i)), len(header))
    if feature_dim < 2:
        raise SlideError(
            f"{path}: found another header row of {len(header)} cells, wanted SlideChat's 0,1,..,patch_name"
        )
    starts = _line_starts(path)
    if len(starts) < 2:
        raise SlideError(f"{path}: found no patches below the header row, wanted at least one")
    return FeatureFile(
        name=str(path), format="SlideChat csv", key="", num_patches=len(starts) - 1, feature_dim=feature_dim,
        dtype="float32", rows=CsvRows(path, starts, feature_dim), identity=identity,
        remarks=("patch names are grid indices, not pixels: kept patches have rows, but no place on the slide",),
    )  # fmt: skip


def header_cells(file: IO[bytes], most: int = 1 << 20) -> list[str]:
    """The cells of a CSV's first line, of which at most that many bytes are read; a byte-order mark is none of them."""
    line = file.readline(most).decode("utf-8-sig", "replace")
    return [cell.strip().strip('"') for cell in line.split(",")]


def is_feature_csv(path: Path) -> bool:
    """Whether a CSV looks like SlideChat's by its first bytes, for a listing of many files."""
    with open(path, "rb") as file:
        return header_cells(file, 64)[:3] == ["0", "1", "2"]


def _line_starts(path: Path) -> NDArray:
    """int64: the first byte of each line behind the header, and the end of the last that is not blank."""
    ends, base, last = [], 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(SCAN_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + base + 1)
            if filled := len(chunk.rstrip()):
                last = base + filled
            base += len(chunk)
    starts = np.concatenate(ends) if ends else np.empty(0, np.int64)
    starts = starts[starts < last]
    return np.append(starts, last) if len(starts) else starts
