"""A file that cannot be used is refused in one sentence, and nothing in it is run."""

import contextlib
import json
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from vllm_wsi.errors import SlideError
from vllm_wsi.slides import features_in_memory, open_features, write_features

from . import feature_stores as stores

N, D = 9, 8
FEATURES = np.random.default_rng(3).standard_normal((N, D)).astype(np.float32)
COORDS = np.arange(2 * N).reshape(N, 2)
Write = Callable[[Path], object]


def refusal(path: Path, encoder: str | None = None) -> str:
    """What open_features, or the first reading of rows and coordinates, says against the file."""
    with pytest.raises(SlideError) as caught:
        read_all(path, encoder)
    message = str(caught.value)
    assert message.isprintable()
    assert path.name in message
    assert re.search(r": found .+, wanted ", message)
    return message


def read_all(path: Path, encoder: str | None = None) -> None:
    with open_features(path, encoder) as slide:
        slide.read_coords()
        slide.read_rows(0, slide.num_patches)


def h5(**datasets: object) -> Write:
    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for key, values in datasets.items():
                file[key] = values

    return write


def h5_of_two_encoders(path: Path) -> None:
    h5(**{"features/conch": FEATURES, "features/uni": FEATURES})(path)


def external(path: Path) -> None:
    data = path.with_suffix(".raw")
    data.write_bytes(FEATURES.tobytes())
    with h5py.File(path, "w") as file:
        file.create_dataset("features", FEATURES.shape, "f4", external=[(str(data), 0, data.stat().st_size)])


def virtual(path: Path) -> None:
    h5(features=FEATURES)(path.with_suffix(".src"))
    layout = h5py.VirtualLayout(FEATURES.shape, "f4")
    layout[:] = h5py.VirtualSource(path.with_suffix(".src"), "features", FEATURES.shape)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("features", layout)


def safetensors(header: object, data: bytes = b"") -> Write:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(dtype: str = "F32", shape: object = (N, D), offsets: object = (0, N * D * 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def npy(array: np.ndarray) -> Write:
    return lambda path: np.save(path, array, allow_pickle=True)


def npy_header(shape: tuple[int, ...], descr: object = "<f4") -> Write:
    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.lib.format.write_array_header_2_0(file, {"descr": descr, "fortran_order": False, "shape": shape})

    return write


def pt(value: object, legacy: bool = False) -> Write:
    return lambda path: torch.save(value, path, _use_new_zipfile_serialization=not legacy)


def npz(compressed: bool = False, **arrays: np.ndarray) -> Write:
    return lambda path: (np.savez_compressed if compressed else np.savez)(path, **arrays)


def csv(*lines: str) -> Write:
    return lambda path: path.write_text("\n".join(lines))


HEADER, ROW = ",".join([*map(str, range(D)), "patch_name"]), ",".join(["0.25"] * D)
UNPLACED = {"dtype": "I32", "shape": [N, 2]}
SECRET = h5py.ExternalLink("secret.h5", "features")
REFUSED = [
    ("missing.h5", lambda path: None, "No such file"),
    ("folder.h5", Path.mkdir, "found a directory"),
    ("pipe.h5", os.mkfifo, "found a pipe"),
    ("loop.h5", lambda path: path.symlink_to(path), "wanted a feature file"),
    ("empty.h5", Path.touch, "found an empty file"),
    ("text.h5", lambda path: path.write_text("no features\n"), "found text, wanted a feature file (safetensors,"),
    ("wrong-key.safetensors", safetensors({"fs": entry()}), "found the keys fs, wanted features named"),
    ("no-key.safetensors", safetensors({}), "found no arrays, wanted features named"),
    ("json.safetensors", safetensors(b'{"features": '), "broken safetensors header"),
    ("utf8.safetensors", safetensors(b'{"\xff": 1}'), "broken safetensors header"),
    ("deep.safetensors", safetensors(b'{"a":' + b"[" * 200_000), "broken safetensors header"),
    ("no-shape.safetensors", safetensors({"features": {"dtype": "F32"}}), "broken safetensors header"),
    ("text-shape.safetensors", safetensors({"features": entry(shape=["9", "8"])}), "broken safetensors header"),
    ("text-offsets.safetensors", safetensors({"features": entry(offsets="ab")}), "broken safetensors header"),
    ("metadata.safetensors", safetensors({"__metadata__": [], "features": entry()}), "broken safetensors header"),
    ("no-offsets.safetensors", safetensors({"features": entry(), "coords": UNPLACED}), "broken safetensors header"),
    ("few-coords.safetensors", safetensors({"features": entry(), "coords": UNPLACED | {"data_offsets": [0, 8]}}),
     "coords: found offsets 0:8"),
    ("few-x.safetensors", safetensors({"features": entry(), "x": entry("I32", [N], [0, 36]),
                                       "y": entry("I64", [N - 1], [0, 64])}), "y: found int64 of shape (8,), wanted"),
    ("turned.safetensors", safetensors({"features": entry(), "x": entry("I32", [-3, -3], [0, 36])}),
     "x: found offsets 0:36"),
    ("bf16-coords.safetensors", safetensors({"features": entry(), "coords": entry("BF16", [N, 2], [0, 36])}),
     "coords: found BF16 of shape (9, 2), wanted one x, y"),
    ("offsets.safetensors", safetensors({"features": entry(offsets=[0, 8])}), "features: found offsets 0:8"),
    ("before.safetensors", safetensors({"features": entry(offsets=[-288, 0])}), "features: found offsets -288:0"),
    ("int.safetensors", safetensors({"features": entry("I32")}), "features: found dtype I32, wanted one of float16"),
    ("coords.safetensors", safetensors({"features": entry(), "coords": entry("I32", (N - 1, 2), (0, 64))}),
     "coords: found int32 of shape (8, 2), wanted one x, y for each of 9 patches"),
    ("negative.safetensors", safetensors({"features": entry(shape=(-N, -D))}), "features: found shape (-9, -8)"),
    ("other-keys.h5", h5(x=FEATURES), "found the keys x, wanted a dataset named 'features' or 'feats'"),
    ("no-keys.h5", h5(), "found the keys no datasets"),
    ("vector.h5", h5(features=FEATURES[0]), "features: found shape (8,), one vector for a whole slide"),
    ("no-tissue.h5", h5(features=FEATURES[:0]), "features: found no patches (shape (0, 8))"),
    ("no-tissue-flat.h5", h5(features=np.empty(0, "f4")), "features: found no patches (shape (0,))"),
    ("no-tissue-batch.h5", h5(features=FEATURES[None, :0]), "features: found no patches (shape (0, 8))"),
    ("no-dim.h5", h5(features=FEATURES[:, :0]), "features: found shape (9, 0)"),
    ("scalar.h5", h5(features=1.0), "features: found shape ()"),
    ("null.h5", h5(features=h5py.Empty("f4")), "features: found shape ()"),
    ("batch.h5", h5(feats=np.stack([FEATURES] * 2)), "feats: found shape (2, 9, 8)"),
    ("int.h5", h5(features=COORDS), "features: found dtype int64, wanted one of float16"),
    ("group.h5", h5(**{"feats/x": FEATURES}), "feats: found a group, wanted a dataset"),
    ("short.h5", h5(features=FEATURES, coords=COORDS[1:]), "coords: found int64 of shape (8, 2), wanted one x, y"),
    ("3d.h5", h5(features=FEATURES, coords=np.ones((N, 3))), "coords: found float64 of shape (9, 3)"),
    ("names.h5", h5(features=FEATURES, coords=[[b"a", b"b"]] * N), "coords: found object of shape (9, 2)"),
    ("null-coords.h5", h5(features=FEATURES, coords=h5py.Empty("i4")), "coords: found int32 of shape None"),
    ("link.h5", h5(features=SECRET), "features: found a link to elsewhere, wanted a dataset in this file"),
    ("feats-link.h5", h5(feats=SECRET), "feats: found a link to elsewhere"),
    ("group-link.h5", h5(**{"features/uni": SECRET}), "features/uni: found a link to elsewhere"),
    ("coords-link.h5", h5(features=FEATURES, coords=SECRET), "coords: found a link to elsewhere"),
    ("soft.h5", h5(x=FEATURES, features=h5py.SoftLink("/x")), "features: found a link to elsewhere"),
    ("dangling.h5", h5(features=h5py.ExternalLink("absent.h5", "x")), "features: found a link to elsewhere"),
    ("dangling-coords.h5", h5(features=FEATURES, coords=h5py.SoftLink("/absent")), "coords: found a link to elsewhere"),
    ("external.h5", external, "features: found data stored in other files"),
    ("virtual.h5", virtual, "features: found data stored in other files"),
    ("two.h5", h5_of_two_encoders, "features: found a group of conch, uni, wanted one choice among them"),
    ("int.npy", npy(COORDS), "found dtype int64"),
    ("fortran.npy", npy(np.asfortranarray(FEATURES)), "found Fortran or big-endian order"),
    ("big-endian.npy", npy(FEATURES.astype(">f4")), "found Fortran or big-endian order"),
    ("negative.npy", npy_header((-N, D)), "found shape (-9, 8)"),
    ("huge.npy", npy_header((1 << 60, D)), "the file is truncated"),
    ("long.npy", npy_header((N,), [("a" * 9000, "<f4"), ("b" * 9000, "<f4")]), "found a broken npy header"),
    ("token.npy", lambda path: path.write_bytes(b"\x93NUMPY\1\0\4\0{'a("), "found a broken npy header"),
    ("dict.pt", pt({"fs": torch.ones(2, 3), "n": 1}), "found the keys fs, wanted features named"),
    ("no-tensors.pt", pt({"a": 1, "n": 1}), "found a dict with the keys a, n, wanted a tensor"),
    ("two-sets.pt", pt({"feats": torch.ones(2, 3), "features": torch.ones(2, 3)}), "found several sets of features"),
    ("few-coords.pt", pt({"feats": torch.ones(3, 4), "coords": torch.zeros(2, 2)}), "coords: found float32 of shape"),
    ("one-axis.pt", pt({"feats": torch.ones(3, 4), "x": torch.zeros(3), "y": torch.zeros(2)}), "y: found float32 of"),
    ("bf16-coords.pt", pt({"feats": torch.ones(3, 4), "coords": torch.zeros(3, 2).bfloat16()}), "found bfloat16 of"),
    ("batch.pt", pt(torch.ones(2, 3, 4)), "found shape (2, 3, 4)"),
    ("fp8-fnuz.pt", pt(torch.ones(2, 3).to(torch.float8_e4m3fnuz)), "found dtype float8_e4m3fnuz"),
    ("list.pt", pt([torch.ones(2, 3)], legacy=True), "found a list, wanted a tensor (N, d)"),
    ("sparse.pt", pt(torch.ones(2, 3).to_sparse()), "found a torch.sparse_coo tensor, wanted a dense one"),
    ("transposed.pt", pt(torch.ones(2, 3).T), "strided view, wanted one contiguous tensor"),
    ("vector.pt", pt(torch.ones(3)), "found shape (3,), one vector for a whole slide"),
    ("int.pt", pt(torch.ones(2, 3, dtype=torch.int32)), "found dtype int32"),
    ("other-keys.npz", npz(a=FEATURES, b=FEATURES), "found the keys a, b, wanted features named"),
    ("two.npz", npz(features=FEATURES, feats=FEATURES), "found several sets of features (features, feats)"),
    ("int.npz", npz(features=COORDS), "features: found dtype int64"),
    ("vector.npz", npz(features=FEATURES[0]), "features: found shape (8,), one vector for a whole slide"),
    ("fortran.npz", npz(features=np.asfortranarray(FEATURES)), "features: found Fortran or big-endian order"),
    ("big-endian.npz", npz(features=FEATURES.astype(">f4")), "features: found Fortran or big-endian order"),
    ("few-coords.npz", npz(features=FEATURES, coords=COORDS[1:]), "coords: found int64 of shape (8, 2)"),
    ("names.npz", npz(features=FEATURES, coords=np.array([["a", "b"]] * N)), "coords: found str"),
    ("object-coords.npz", npz(features=FEATURES, x=COORDS[:, 0], y=COORDS[1:, 1]), "y: found int64 of shape (8,)"),
    ("many.npz", npz(features=FEATURES, **{f"a{i}": COORDS for i in range(100)}), "found 101 arrays, wanted at most"),
    ("no-header.csv", csv(ROW + ",0_0.jpeg"), "found another header row of 9 cells"),
    ("no-patches.csv", csv(HEADER), "found no patches below the header row"),
    ("one-cell.csv", csv(HEADER, ROW + ",a", "0.5"), "line 3: found 1 cells"),
    ("blank-line.csv", csv(HEADER, ROW + ",a", "", ROW + ",b"), "line 3: found a blank line"),
    ("semicolons.csv", csv(HEADER.replace(",", ";"), ROW.replace(",", ";")), "found another header row of 1 cells"),
    ("only-blank.csv", csv(HEADER, "", "", ""), "found no patches below the header row"),
    ("cut-number.csv", csv(HEADER, ROW + ",a", ROW[:-1]), "line 3: found 8 cells"),
    ("word.csv", csv(HEADER, ROW.replace("0.25", "none", 1) + ",a"), "line 2: found 9 cells"),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "write", "said"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_an_odd_file_is_refused_in_one_sentence(name: str, write: Write, said: str, tmp_path: Path):
    h5(features=FEATURES)(tmp_path / "secret.h5")
    write(tmp_path / name)
    assert said in refusal(tmp_path / name)


def test_an_image_named_h5_is_refused(shared_data: Path, tmp_path: Path):
    shutil.copyfile(shared_data / "slides" / "small.svs", tmp_path / "small.h5")
    assert "found a slide image, wanted features; encode it once: vllm-wsi encode SLIDE" in refusal(
        tmp_path / "small.h5"
    )


def test_a_name_with_nul_is_refused():
    with pytest.raises(SlideError, match=r"^'a\\x00b\.h5': found an impossible file name, wanted a feature file$"):
        open_features("a\0b.h5")


WHOLE: dict[str, Write] = {
    "ours.safetensors": lambda path: write_features(path, FEATURES.astype(np.float16), COORDS),
    "coords-last.safetensors": lambda path: write_features(path, FEATURES.astype(np.float64), COORDS),
    "plain.h5": h5(features=FEATURES, coords=COORDS),
    "array.npy": npy(FEATURES),
    "new.pt": pt(torch.from_numpy(FEATURES)),
    "legacy.pt": pt(torch.from_numpy(FEATURES), legacy=True),
    "dict.pt": pt({"features": torch.from_numpy(FEATURES), "coords": torch.from_numpy(COORDS)}),
    "plain.npz": npz(features=FEATURES, coords=COORDS),
    "packed.npz": npz(True, features=FEATURES, coords=COORDS),
    "table.h5ad": lambda path: stores.h5ad(path, FEATURES, COORDS),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_cut_anywhere_is_refused(name: str, tmp_path: Path):
    WHOLE[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in {*range(1, 130, 3), *range(130, len(whole), 53), len(whole) - 1}:
        (tmp_path / name).write_bytes(whole[:length])
        refusal(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("name", "least"), [("plain.h5", 150), ("ours.safetensors", 50), ("legacy.pt", 150), ("dict.pt", 100),
     ("plain.npz", 50), ("packed.npz", 100)],
)  # fmt: skip
def test_a_damaged_byte_gives_a_refusal_or_rows_and_no_other_error(name: str, least: int, tmp_path: Path):
    WHOLE[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    refused = 0
    for place in range(min(len(whole), 1000)):
        (tmp_path / name).write_bytes(whole[:place] + b"\xfe" + whole[place + 1 :])
        with contextlib.suppress(SlideError):
            refused += 1
            read_all(tmp_path / name)
            refused -= 1
    assert refused > least


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_patch_that_lies_nowhere_is_named_when_places_are_read(bad: float, tmp_path: Path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.ones((3, 4), "f4")
        file["coords"] = np.array([[0, 0], [256, bad], [512, 0]])
    said = r"a\.h5: coords: found \[256.0, .* in row 1, wanted"
    with open_features(path) as slide, pytest.raises(SlideError, match=said):
        slide.read_coords()


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "coords-last.safetensors"])
def test_an_encoder_asked_of_a_file_with_one_set_is_refused(name: str, tmp_path: Path):
    WHOLE[name](tmp_path / name)
    assert "found one set of features" in (message := refusal(tmp_path / name, "uni"))
    assert message.endswith("encoder=uni")


def test_an_encoder_that_the_file_lacks_is_refused_with_those_it_has(tmp_path: Path):
    h5_of_two_encoders(tmp_path / "two.h5")
    assert "found a group of conch, uni, wanted encoder 'virchow'" in refusal(tmp_path / "two.h5", "virchow")


def test_an_array_in_memory_of_integers_is_refused():
    with pytest.raises(SlideError, match=r"^upload: found dtype int64, wanted one of float16"):
        features_in_memory(COORDS, "upload")


def test_an_h5_that_claims_more_rows_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "claims.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", (10**9, 8), "f4", chunks=(1024, 8))
    with pytest.raises(SlideError, match=r"found 0 of 976563 chunks, wanted all"):
        open_features(path)


@pytest.mark.parametrize("buffer", [np.empty((5, 4), "f8"), np.empty((5, 3), "f4"), np.empty((1, 4), "f4")])
def test_a_buffer_of_another_dtype_or_shape_is_refused(tmp_path, buffer):
    np.save(tmp_path / "a.npy", np.ones((2, 4), np.float32))
    with open_features(tmp_path / "a.npy") as slide, pytest.raises(ValueError, match="found a buffer"):
        slide.read_rows(0, 2, buffer)


SECRET_TEXT = "root:x:0:0:TopSecret"
SECRET_FILES: dict[str, Write] = {
    "text": lambda path: path.write_text(SECRET_TEXT),
    "text.csv": lambda path: path.write_text(f"{SECRET_TEXT},1\n{SECRET_TEXT},2\n"),
    "cell.csv": csv(HEADER, ROW.replace("0.25", SECRET_TEXT, 1) + ",a"),
    "header.npy": lambda path: path.write_bytes(b"\x93NUMPY\1\0\x40\0" + SECRET_TEXT.encode() + bytes(60)),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe" + SECRET_TEXT.encode()),
    "archive.zip": lambda path: zipfile.ZipFile(path, "w").writestr(SECRET_TEXT, SECRET_TEXT),
    "header.safetensors": safetensors(SECRET_TEXT.encode()),
    "pickle.pkl": lambda path: path.write_bytes(b"\x80\x04\x8c\x14" + SECRET_TEXT.encode() + b"."),
    "global.pt": lambda path: path.write_bytes(b"\x80\x02c" + SECRET_TEXT.encode() + b"\n" + SECRET_TEXT.encode()),
    "table.parquet": lambda path: path.write_bytes(b"PAR1" + SECRET_TEXT.encode() + b"PAR1"),
    "signature.h5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + SECRET_TEXT.encode()),
}


@pytest.mark.parametrize("name", SECRET_FILES)
def test_no_error_shows_what_a_file_that_is_not_features_holds(name: str, tmp_path: Path):
    SECRET_FILES[name](tmp_path / name)
    message = refusal(tmp_path / name)
    assert not {"root:x", "TopSecret", "0:0"} & {part for part in ("root:x", "TopSecret", "0:0") if part in message}
