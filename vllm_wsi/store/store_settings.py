"""Which store a user names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from vllm_wsi.errors import SettingsError

ENVIRONMENT = "VLLM_WSI_STORE"
MAX_BYTES = 10 << 30


class StoreSettings(NamedTuple):
    folder: Path
    max_bytes: int


def store_settings(folder: str | os.PathLike[str] | None, max_gib: object = None) -> StoreSettings | None:
    """A store as a user names it: by the folder, else by the environment variable VLLM_WSI_STORE; None: none is named.

    Args:
        max_gib: bound of its files, a number; None: 10.

    Raises:
        SettingsError: the bound is no positive number, or is given without a folder.
    """
    folder = folder or os.environ.get(ENVIRONMENT) or None
    if max_gib is not None and folder is None:
        raise SettingsError("selection_store_gib: found no selection_store, wanted its folder too")
    try:
        max_bytes = MAX_BYTES if max_gib is None else int(float(max_gib) * (1 << 30))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        max_bytes = 0
    if max_bytes <= 0:
        raise SettingsError(f"selection_store_gib: found {max_gib!r}, wanted a positive number")
    return None if folder is None else StoreSettings(Path(folder).absolute(), max_bytes)
