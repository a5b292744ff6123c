"""Slides of random features: good ones in every format, bad ones in every way. All from a seed."""

from __future__ import annotations

import base64
import functools
import http.server
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from vllm_wsi.slides import write_features

D = 64
MAX_PATCHES = 4096
FORMATS = ("safetensors", "h5", "gzip.h5", "npy", "pt", "csv")
CSV_ROWS = 64  # text is slow to write


class Slides:
    """Writes slides of random features below a folder; one object serves one event loop.

    Args:
        folder: that the server may read.
        seed: of features, sizes and formats.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self._random, self._number = folder, random.Random(seed), 0
        self._pool = np.random.default_rng(seed).standard_normal((3 * MAX_PATCHES, D)).astype(np.float32)

    def features(self, num_patches: int) -> NDArray:
        """[num_patches, D] float32: another window of one pool each time, so that writing is all it costs."""
        start = self._random.randrange(len(self._pool) - num_patches)
        return self._pool[start : start + num_patches]

    def new(self, form: str | None = None, num_patches: int | None = None) -> tuple[Path, int]:
        """(path, number of patches) of a slide that never was before; by default 0.25 to 1 MiB of features."""
        form = form or self._random.choice(FORMATS)
        num_patches = num_patches or self._random.randint(MAX_PATCHES // 4, MAX_PATCHES)
        if form == "csv":
            num_patches = min(num_patches, CSV_ROWS)
        self._number += 1
        path = self.folder / f"{self._number:05d}.{form}"
        write(path, self.features(num_patches))
        return path, num_patches

    def data_url(self) -> tuple[str, int]:
        """(data: URL, number of patches) of a small slide of any format."""
        path, num_patches = self.new(num_patches=self._random.randint(40, 200))
        data = base64.b64encode(path.read_bytes()).decode()
        path.unlink()
        return f"data:application/octet-stream;base64,{data}", num_patches

    def broken(self) -> dict[str, tuple[str, int]]:
        """Name of a fault -> (URL of a file that has it, or that is not there, and the HTTP status it must get)."""
        whole, _ = self.new("safetensors", 1000)
        faults = {fault: self.folder / f"{fault}.safetensors" for fault in ("truncated", "text", "wrong d", "NaN")}
        faults["truncated"].write_bytes(whole.read_bytes()[:100_000])
        faults["text"].write_text("features, they said\n")
        write_features(faults["wrong d"], np.ones((500, D // 2), np.float32))
        write_features(faults["NaN"], np.full((500, D), np.nan, np.float32))
        h5 = faults["truncated h5"] = self.folder / "truncated.h5"
        gzip, _ = self.new("gzip.h5", 1000)
        h5.write_bytes(gzip.read_bytes()[:100_000])
        faults["missing"] = self.folder / "missing.safetensors"
        urls = {fault: path.as_uri() for fault, path in faults.items()}
        urls |= {"wrong k": f"{whole.as_uri()}#k=0", "outside": "file:///etc/hostname"}
        urls["broken base64"] = "data:application/octet-stream;base64,@@@"
        return {fault: (url, 400) for fault, url in urls.items()}


def write(path: Path, features: NDArray) -> None:
    """In the format that the name ends with. Where it says where patches lie, they lie on a grid of 16 columns."""
    num_patches = len(features)
    coords = np.stack([np.arange(num_patches) % 16, np.arange(num_patches) // 16], axis=1) * 256
    match path.name.split(".", 1)[1]:
        case "safetensors":
            write_features(path, features, coords, {"patch_size_level0": "256"})
        case "h5" | "gzip.h5" as form:
            layout = {} if form == "h5" else {"compression": "gzip", "chunks": (min(256, num_patches), D)}
            with h5py.File(path, "w") as file:
                file.create_dataset("features", data=features, **layout)
                file["coords"] = coords
                file["coords"].attrs["patch_size_level0"] = 256
        case "npy":
            np.save(path, features)
        case "pt":
            torch.save(torch.from_numpy(features.copy()), path)
        case "csv":
            lines = [",".join(map(str, [*range(D), "patch_name"]))]
            lines += [",".join(map(str, [*row, f"0_{i}"])) for i, row in enumerate(features.tolist())]
            path.write_text("\n".join(lines) + "\n")
        case other:
            raise ValueError(f"format: found {other!r}, wanted one of {', '.join(FORMATS)}")


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Root URL of a web server of a folder, on this machine."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
