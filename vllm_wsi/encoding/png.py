"""PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vllm_wsi.files import write_atomically


def png(picture: NDArray[np.uint8]) -> bytes:
    """RGB or RGBA [h, w, c] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    write_atomically(path, png(picture))
