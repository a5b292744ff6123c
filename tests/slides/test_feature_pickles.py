"""A pickle is never loaded; where it holds features, the refusal says how to convert it."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_wsi.errors import SlideError
from vllm_wsi.slides import open_features

FEATURES = np.random.default_rng(3).standard_normal((9, 8)).astype(np.float32)


def pickled(protocol: int) -> Callable[[Path, object], object]:
    return lambda path, value: path.write_bytes(pickle.dumps(value, protocol))


def npy(path: Path, value: object) -> None:
    cell = np.empty((), object)
    cell[()] = value
    np.save(path, cell, allow_pickle=True)


def pt(path: Path, value: object) -> None:
    torch.save(value, path)


def legacy_pt(path: Path, value: object) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def load_pickle(path: Path) -> object:
    return pickle.loads(path.read_bytes())


def load_npy(path: Path) -> object:
    return np.load(path, allow_pickle=True)


def load_pt(path: Path) -> object:
    return torch.load(path, weights_only=False)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mknod, (str(self.marker),)


def refusal(path: Path) -> str:
    with pytest.raises(SlideError) as caught:
        open_features(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{path}: found ")
    return message


@pytest.mark.parametrize(
    ("name", "write", "load"),
    [
        *[(f"protocol{n}.pkl", pickled(n), load_pickle) for n in range(pickle.HIGHEST_PROTOCOL + 1)],
        ("named.h5", pickled(4), load_pickle),
        ("named.csv", pickled(0), load_pickle),
        ("named.pt", pickled(2), load_pickle),
        ("object.npy", npy, load_npy),
        ("new.pt", pt, load_pt),
        ("legacy.pt", legacy_pt, load_pt),
    ],
)
def test_opening_a_pickle_runs_nothing_in_it(name: str, write, load, tmp_path: Path):
    marker = tmp_path / "marker"
    write(tmp_path / name, Bomb(marker))
    refusal(tmp_path / name)
    assert not marker.exists()
    load(tmp_path / name)
    assert marker.exists()  # the file was able to do it


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("trident.pt", lambda path: pt(path, FEATURES), "TRIDENT's .pt holds a NumPy array"),
        ("dict.pt", lambda path: pt(path, {"KEY": FEATURES}), "TRIDENT's .pt holds a NumPy array"),
        (
            "objects.npz",
            lambda path: np.savez(path, features=np.array(FEATURES, object)),
            "found pickled Python objects",
        ),
        ("old.pt", lambda path: legacy_pt(path, FEATURES), "wanted a tensor (N, d)"),
        ("plain.pkl", lambda path: pickled(4)(path, FEATURES), "found a pickle, which can run code"),
        ("objects.npy", lambda path: np.save(path, FEATURES.astype(object)), "found a pickled Python object"),
        ("gtex.npy", lambda path: npy(path, {"KEY": FEATURES}), "found a pickled Python object"),
        ("several.npz", lambda path: np.savez(path, KEY=FEATURES), "found the keys KEY, wanted features named"),
    ],
)
def test_the_conversion_that_a_refusal_offers_works(name: str, write, said: str, tmp_path: Path):
    write(tmp_path / name)
    message = refusal(tmp_path / name)
    assert said in message
    command = re.search(r"; convert it once, where you trust the file: (numpy\.save\(.+\))$", message)[1]
    target = tmp_path / "features.npy"
    command = command.replace('"features.npy"', repr(str(target))).replace("FILE", repr(str(tmp_path / name)))
    eval(command, {"numpy": np, "torch": torch, "pickle": pickle})
    with open_features(target) as slide:
        assert np.array_equal(slide.read_rows(0, 9), FEATURES)


def test_a_zip_of_other_things_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as archive:
        archive.writestr("notes.txt", "no features")
    assert refusal(tmp_path / "notes.zip").startswith(
        f"{tmp_path / 'notes.zip'}: found a zip archive of other things, wanted a feature file"
    )
