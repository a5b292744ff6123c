"""Everything that is not a slide, as files of a folder."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import torch

from .conftest import D, make_slide


def make_odd_slides(folder: Path) -> dict[str, tuple[Path, str]]:
    """What is odd -> (file, a part of the sentence that must come back)."""
    odd: dict[str, tuple[Path, str]] = {}

    def add(what: str, name: str, sentence: str) -> Path:
        path = folder / name
        odd[what] = (path, sentence)
        return path

    add("missing file", "missing.h5", "found no readable file")
    add("directory", "folder.h5", "found a directory").mkdir()
    good = folder / "good.h5"
    with h5py.File(good, "w") as file:
        file["features"] = np.ones((50, D), np.float32)
    add("truncated h5", "truncated.h5", "truncated").write_bytes(good.read_bytes()[:4000])
    make_slide(add("wrong d", "wrong_d.safetensors", f"found d = {D + 2}, wanted {D}"), 20, d=D + 2)
    for what, name, sentence, shape in (
        ("no patches", "empty.h5", "found no patches", (0, D)),
        ("one dimension", "vector.h5", "one vector for a whole slide", (D,)),
    ):
        with h5py.File(add(what, name, sentence), "w") as file:
            file["features"] = np.zeros(shape, np.float32)
    nan = np.full((40, D), np.nan, np.float32)
    np.save(add("only NaN", "nan.npy", "found no patch with a finite score"), nan)
    torch.save(torch.ones(D), add("1-D tensor", "vector.pt", "one vector for a whole slide"))
    torch.save(nan, add("pickled array", "trident.pt", "weights_only=False"))
    add("pickle", "pickle.pkl", "found a pickle").write_bytes(pickle.dumps({"features": nan}))
    add("text named h5", "text.h5", "found text").write_text("features, they said\n")
    add("nothing", "nothing.h5", "found an empty file").touch()
    return odd
