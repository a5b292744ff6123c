"""Small files that would cost much: refused by what they claim, before anything is unpacked or allocated."""

import gc
import json
import pickletools
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from vllm_wsi.errors import SlideError
from vllm_wsi.slides import open_features


def h5(path: Path, **datasets) -> Path:
    with h5py.File(path, "w") as file:
        for key, options in datasets.items():
            file.create_dataset(key, **options)
    return path


def torch_zip(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A `.pt` whose data.pkl is replaced."""
    torch.save(torch.ones(3, 4), path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, pickled if name.endswith("/data.pkl") else data)
    return path


def safetensors(path: Path, header: dict) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4096))
    return path


def entry(shape, begin=0, end=None):
    size = 4 * int(np.prod(shape))
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + size if end is None else end]}


@pytest.mark.parametrize("chunks", [None, (1024, 64)])
@pytest.mark.parametrize("key", ["features", "coords"])
def test_an_h5_whose_data_were_never_written_is_refused(tmp_path, key, chunks):
    unwritten = {"shape": (5000, 64 if key == "features" else 2), "dtype": "f4"}
    unwritten |= {} if chunks is None else {"chunks": (1024, unwritten["shape"][1])}
    datasets = {"features": {"data": np.ones((5000, 64), "f4")}, key: unwritten}
    with pytest.raises(SlideError, match=f"{key}: found 0 of"):
        open_features(h5(tmp_path / "a.h5", **datasets))


@pytest.mark.parametrize("columns", [2, 5])
def test_coordinates_that_unpack_to_more_than_a_slide_has_are_refused(tmp_path, columns):
    n = (64 << 20) // 8 // columns + 1
    packed = {"chunks": True, "compression": "gzip"}
    path = tmp_path / "a.h5"
    datasets = {"features": np.ones((n, 1), np.float16), "coords": np.ones((n, columns))}
    h5(path, **{key: {"data": data, **packed} for key, data in datasets.items()})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(SlideError, match=rf"coords: found shape \({n}, {columns}\), wanted at most 67108864 bytes"):
        open_features(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("shape", [(1 << 16, 1 << 10), (1 << 40, 1 << 20)])
def test_a_tensor_that_repeats_a_few_numbers_is_refused(tmp_path, shape, legacy):
    path = tmp_path / "a.pt"
    torch.save(torch.ones(1).expand(shape), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SlideError, match=f"found 4 bytes of {4 * shape[0] * shape[1]}, wanted every number stored"):
        open_features(path)


def test_an_h5_in_one_large_chunk_is_refused_with_the_way_to_repack_it(tmp_path):
    shape = (1_100_000, 16)
    data = {"data": np.zeros(shape, "f4"), "chunks": shape, "compression": "gzip"}
    with pytest.raises(SlideError, match="found chunks of 67 MiB, wanted at most 64; repack it once: h5repack"):
        open_features(h5(tmp_path / "a.h5", features=data))


def test_a_pickle_that_calls_a_builtin_is_refused_without_being_run(tmp_path):
    bomb = b"\x80\x02c__builtin__\nbytearray\nJ" + struct.pack("<i", 10**9) + b"\x85R."
    assert [op.name for op, _, _ in pickletools.genops(bomb)][-2:] == ["REDUCE", "STOP"]
    with pytest.raises(SlideError, match="found pickled Python objects"):
        open_features(torch_zip(tmp_path / "a.pt", bomb))


def test_a_compressed_pickle_is_refused(tmp_path):
    with pytest.raises(SlideError, match="found pickled Python objects"):
        open_features(torch_zip(tmp_path / "a.pt", b"\x80\x02N.", zipfile.ZIP_DEFLATED))


def test_a_long_pickle_is_refused(tmp_path):
    with pytest.raises(SlideError, match="found pickled Python objects"):
        open_features(torch_zip(tmp_path / "a.pt", b"\x80\x02" + b"N0" * 40_000 + b"N."))


def test_a_packed_array_beside_features_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_wsi.slides.formats.npz_features.MAX_UNPACKED", 32 << 20)
    n = 3 << 20
    np.savez_compressed(tmp_path / "a.npz", features=np.zeros((n, 1), np.float16), coords=np.zeros((n, 2), np.int64))
    assert (tmp_path / "a.npz").stat().st_size < 1 << 20
    with pytest.raises(SlideError, match="coords: found 50331776 bytes, wanted at most 33554432"):
        open_features(tmp_path / "a.npz")


def test_an_npz_whose_record_is_not_of_its_headers_size_is_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", features=np.ones((4, 8), np.float32))
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        data = archive.read("features.npy")
    for length in (len(data) - 1, len(data) + 1):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("features.npy", (data + b"x")[:length])
        with pytest.raises(SlideError, match=f"features: found a record of {length} bytes, wanted {len(data)} by its"):
            open_features(tmp_path / "a.npz")


@pytest.mark.parametrize("make", ["safetensors", "h5"])
def test_metadata_that_would_be_remembered_with_every_selection_are_bounded(tmp_path, make):
    long = {"note": "x" * 70_000}
    if make == "safetensors":
        path = safetensors(tmp_path / "a", {"__metadata__": long, "features": entry([4, 8])})
    else:
        path = h5(tmp_path / "a", features={"data": np.ones((4, 8), "f4")})
        with h5py.File(path, "a") as file:
            for i in range(20):
                file.attrs[f"note{i}"] = "x" * 4000
    with pytest.raises(SlideError, match=r"metadata: found \d+ characters, wanted at most 65536"):
        open_features(path)


@pytest.mark.parametrize(
    "bad", [entry([40.0, 8]), entry([True, 8]), entry([4, 8], end=128.0), {**entry([4, 8]), "shape": "48"}]
)
def test_numbers_that_are_not_whole_are_refused(tmp_path, bad):
    with pytest.raises(SlideError, match="found a broken safetensors header"):
        open_features(safetensors(tmp_path / "a", {"features": bad}))


def test_half_of_a_surrogate_pair_leaves_as_a_question_mark(tmp_path):
    path = safetensors(tmp_path / "a", {"__metadata__": {"note": "\ud800"}, "features": entry([4, 8])})
    with open_features(path) as slide:
        assert slide.metadata == {"note": "?"}
    with pytest.raises(SlideError) as error:
        open_features(safetensors(tmp_path / "b", {"\ud800": entry([4, 8])}))
    str(error.value).encode()


def test_a_slide_that_is_never_closed_is_closed_with_its_last_reference(tmp_path, open_files_below):
    np.save(tmp_path / "a.npy", np.ones((4, 8), np.float32))
    slide = open_features(tmp_path / "a.npy")
    assert open_files_below() == 1
    del slide
    gc.collect()
    assert open_files_below() == 0


SLOW_READER = """
import sys
from vllm_wsi.slides import open_features
try:
    with open_features(sys.argv[1]) as slide:
        print("opened", slide.metadata)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("place", ["first object", "free space"])
def test_an_h5_whose_strings_the_library_would_read_for_ever_is_refused(tmp_path, place):
    """In a process of its own: the library would hold Python's lock, and with it this one."""
    path = h5(
        tmp_path / "endless.h5", features={"data": np.ones((4, 8), "f4")}, coords={"data": np.zeros((4, 2), "i4")}
    )
    with h5py.File(path, "a") as file:
        for i in range(40):
            file["coords"].attrs[f"name{i}"] = f"value {i} " + "x" * 40
    good = subprocess.run([sys.executable, "-c", SLOW_READER, str(path)], capture_output=True, text=True, timeout=60)
    assert "opened" in good.stdout
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    size = int.from_bytes(data[heap + 8 : heap + 16], "little")
    if place == "first object":  # then the next is free space of no size
        data[heap + 24 : heap + 32] = (8).to_bytes(8, "little")
        data[heap + 40 : heap + 56] = bytes(16)
    else:
        at = heap + 16
        while int.from_bytes(data[at : at + 2], "little"):
            at += 16 + -(-int.from_bytes(data[at + 8 : at + 16], "little") // 8) * 8
        assert at < heap + size
        data[at + 8 : at + 16] = bytes(8)
    path.write_bytes(data)
    found = subprocess.run([sys.executable, "-c", SLOW_READER, str(path)], capture_output=True, text=True, timeout=60)
    assert "found an HDF5 signature but no readable file" in found.stdout
