"""Real breast patches with labels, as `idc_patches.zip` and `idc_slide_14082.zip` hold them.

Patches of 50 x 50 px at 4 um per pixel (200 um edge) of patients with breast cancer; the label says whether a patch is
invasive ductal carcinoma (Cruz-Roa et al., SPIE Medical Imaging 2014; Janowczyk and Madabhushi, J Pathol Inform 2016).
"""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SetupError, SlideError, needs_extra

IDC_PATCHES = "idc_patches.zip"
"""Patches of many patients."""

IDC_SLIDE = "idc_slide_14082.zip"
"""Patches that nearly tile the slide of one further patient."""

INDEX = "index.csv"
COLUMNS = ("patient", "x", "y", "label", "file")
PATCH_PX = 50
PATCH_MPP = 4.0  # um per pixel


@dataclass(frozen=True, eq=False)
class TissuePatches:
    """The labelled patches of one archive, in the order of its index.

    `num_left_out` of the index's patches are not among them: at a slide's border some are smaller than 50 x 50 px.
    """

    archive: Path
    sha256: str  # of the archive, in hexadecimal
    patients: NDArray[np.str_]  # [n]
    labels: NDArray[np.bool_]  # [n], True: invasive ductal carcinoma
    coords_px: NDArray[np.int64]  # [n, 2], x and y of the top-left corner, at 4 um per pixel
    num_left_out: int
    _files: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """RGB [n, 50, 50, 3]. Read when first asked for; 7.5 kB a patch.

        Raises:
            SlideError: a picture is broken.
        """
        with needs_extra("slides"):
            from PIL import Image, UnidentifiedImageError
        found = np.empty((len(self), PATCH_PX, PATCH_PX, 3), np.uint8)
        with zipfile.ZipFile(self.archive) as archive:
            for row, name in enumerate(self._files):
                try:
                    with Image.open(io.BytesIO(archive.read(name))) as image:
                        found[row] = np.asarray(image.convert("RGB"))
                except (OSError, UnidentifiedImageError, zipfile.BadZipFile, SyntaxError) as error:
                    raise SlideError(
                        f"{self.archive}: {name}: found no readable picture ({error}), wanted PNG"
                    ) from error
        return found


def tissue_archive(folder: str | Path, name: str) -> Path:
    """The path of one of the tissue files.

    Raises:
        SetupError: the folder or the file is not there.
    """
    path = Path(folder) / name
    if not path.is_file():
        what = "no such folder" if not Path(folder).is_dir() else f"no {name} in it"
        raise SetupError(
            f"{folder}: found {what}, wanted the folder of the labelled tissue ({IDC_PATCHES}, {IDC_SLIDE} and "
            "kather2016_features_84d.npz), which is not part of this package: docs/tissue.md says what it holds"
        )
    return path


def read_patches(folder: str | Path, name: str = IDC_PATCHES) -> TissuePatches:
    """The patches of an archive; their pictures are read later, when they are asked for.

    Args:
        folder: that holds the archive.
        name: `IDC_PATCHES` or `IDC_SLIDE`.

    Raises:
        SetupError: it is not there.
        SlideError: it is no such archive, or its index and its pictures do not fit.
    """
    path = tissue_archive(folder, name)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with zipfile.ZipFile(path) as archive:
            rows = _index(path, archive)
            sizes = [_png_size(path, archive, row["file"]) for row in rows]
    except zipfile.BadZipFile as error:
        raise SlideError(f"{path}: found no readable zip archive ({error}), wanted the labelled patches") from error
    used = [row for row, size in zip(rows, sizes, strict=True) if size == (PATCH_PX, PATCH_PX)]
    if not used:
        raise SlideError(f"{path}: found no patch of {PATCH_PX} x {PATCH_PX} px, wanted at least one")
    return TissuePatches(
        path,
        sha256,
        np.array([row["patient"] for row in used]),
        np.array([row["label"] == "1" for row in used]),
        np.array([(int(row["x"]), int(row["y"])) for row in used], np.int64),
        len(rows) - len(used),
        tuple(row["file"] for row in used),
    )


def _index(path: Path, archive: zipfile.ZipFile) -> list[dict[str, str]]:
    names = set(archive.namelist())
    if INDEX not in names:
        raise SlideError(f"{path}: found no {INDEX}, wanted it with the columns {', '.join(COLUMNS)}")
    reader = csv.DictReader(io.StringIO(archive.read(INDEX).decode("utf-8-sig")))
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise SlideError(f"{path}: {INDEX}: found no column {', '.join(missing)}, wanted {', '.join(COLUMNS)}")
    rows = list(reader)
    for number, row in enumerate(rows, 2):
        where = f"{path}: {INDEX}, line {number}"
        if row["label"] not in ("0", "1"):
            raise SlideError(f"{where}: label: found {row['label']!r}, wanted 0 or 1")
        if not (str(row["x"]).isdecimal() and str(row["y"]).isdecimal() and row["patient"]):
            found = (row["patient"], row["x"], row["y"])
            raise SlideError(f"{where}: found {found}, wanted a patient and whole pixels x and y")
        if row["file"] not in names:
            raise SlideError(f"{where}: file: found no {row['file']!r} in the archive, wanted a picture")
    return rows


def _png_size(path: Path, archive: zipfile.ZipFile, name: str) -> tuple[int, int]:
    """Width and height by the header alone."""
    with archive.open(name) as file:
        head = file.read(24)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise SlideError(f"{path}: {name}: found no PNG header, wanted a picture in PNG")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
