"""Chosen rows of every format: the same as of the whole, and no more read than their format makes necessary."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_wsi.errors import SlideError
from vllm_wsi.selection.chunk_reader import read_tensor_rows
from vllm_wsi.slides import features_in_memory, open_features
from vllm_wsi.slides.formats.zarr_store import ZarrArray

from . import feature_stores as stores
from .test_feature_formats import CASES, F32, Case, D, N, h5, slidechat, tensor

CHOICES = [[], [0], [N - 1], [0, N - 1], list(range(N)), [3, 4, 5], [0, 2, 3, 9, 14, 15, 20]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chosen_rows_are_those_of_the_whole(case: Case, tmp_path: Path):
    case.write(tmp_path / case.name)
    with open_features(tmp_path / case.name, case.encoder) as slide:
        for rows in CHOICES if case.num_patches == N else [[], [0]]:
            for _ in range(2):  # a reader that goes on from where it stands goes back too
                found = slide.read_at(np.array(rows, int))
                assert (found.dtype, found.shape) == (slide.storage_dtype, (len(rows), D))
                assert np.array_equal(found, case.rows[rows])


class Counted:
    """Rows in memory that note what is read of them."""

    def __init__(self, array: np.ndarray, near_rows: int) -> None:
        self._array, self.near_rows = array, near_rows
        self.read: list[tuple[int, int]] = []

    def read_into(self, start: int, out: np.ndarray) -> None:
        self.read.append((start, start + len(out)))
        out[:] = self._array[start : start + len(out)]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("near", "wanted"),
    [
        (1, [(2, 3), (4, 7), (10, 11), (19, 21)]),
        (3, [(2, 7), (10, 11), (19, 21)]),
        (4, [(2, 11), (19, 21)]),
        (100, [(2, 21)]),
    ],
)
def test_near_rows_are_read_in_one_piece_and_far_ones_apart(near, wanted):
    slide = features_in_memory(F32)
    slide.rows = counted = Counted(F32, near)
    rows = np.array([2, 4, 5, 6, 10, 19, 20])
    assert np.array_equal(slide.read_at(rows), F32[rows])
    assert counted.read == wanted


@pytest.mark.parametrize("span_rows", [1, 2, 5])
def test_a_long_run_is_read_in_pieces_of_few_megabytes(span_rows, monkeypatch):
    monkeypatch.setattr("vllm_wsi.slides.feature_file.SPAN_BYTES", span_rows * D * 4)
    slide = features_in_memory(F32)
    slide.rows = counted = Counted(F32, 2)
    for rows in (np.arange(N), np.arange(0, N, 2)):
        counted.read.clear()
        assert np.array_equal(slide.read_at(rows), F32[rows])
        assert max(stop - start for start, stop in counted.read) <= max(2, span_rows)


@pytest.mark.parametrize("rows", [[-1], [N], [0, 0], [3, 2], [0, 1, N]])
def test_rows_out_of_range_or_order_are_refused(rows):
    with pytest.raises(IndexError, match="found rows out of"):
        features_in_memory(F32).read_at(np.array(rows))


def test_lines_of_a_csv_that_are_not_wanted_are_not_parsed(tmp_path: Path):
    path = tmp_path / "a.csv"
    slidechat("a").write(path)
    lines = path.read_text().splitlines()
    lines[8] = "broken," + lines[8]
    path.write_text("\n".join(lines))
    wanted = [row for row in range(N) if row != 7]
    with open_features(path) as slide:
        assert np.array_equal(slide.read_at(np.array(wanted)), F32[wanted])
        with pytest.raises(SlideError, match="line 9: found 10 cells, wanted 8 numbers and a name"):
            slide.read_at(np.arange(N))


def test_chunks_of_a_store_that_hold_no_wanted_row_are_not_unpacked(tmp_path: Path, monkeypatch):
    stores.zarr_group(tmp_path / "a.zarr", {"features": F32}, chunks=(4, D))
    unpacked = []
    chunk = ZarrArray._chunk
    monkeypatch.setattr(ZarrArray, "_chunk", lambda self, place: unpacked.append(place[0]) or chunk(self, place))
    with open_features(tmp_path / "a.zarr") as slide:
        unpacked.clear()
        slide.read_at(np.array([0, 3, 9, 10, 20]))
    assert unpacked == [0, 2, 5]


def test_each_chunk_of_an_h5_file_is_unpacked_once(tmp_path: Path):
    h5(tmp_path / "a.h5", {"features": F32}, chunks=(4, D), compression="gzip")
    with open_features(tmp_path / "a.h5") as slide:
        assert slide.rows.near_rows == 4
        slide.rows = counted = Counted(F32, slide.rows.near_rows)
        slide.read_at(np.array([0, 3, 9, 11, 20]))
    assert counted.read == [(0, 4), (9, 12), (20, 21)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensor_rows_come_in_the_order_that_is_asked_for(dtype):
    values = tensor(dtype)
    raw = values.view(torch.uint16).numpy() if dtype == "bfloat16" else values.numpy()
    slide = features_in_memory(raw, dtype=dtype)
    for rows in ([], [5], [20, 3, 7, 0]):
        assert torch.equal(read_tensor_rows(slide, torch.tensor(rows, dtype=torch.int64)), values[rows])
    assert torch.equal(read_tensor_rows(slide), values)
