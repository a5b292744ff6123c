"""`vllm-wsi store`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_wsi.errors import SettingsError

from .options import argument, option

CHECK_HELP = "read every file; damaged and foreign ones are removed"
PRUNE_HELP = "remove what was not used for the longest time, until so many GiB are left"


def store(
    folder: Annotated[Path, argument(metavar="DIR")],
    check: Annotated[bool, option("--check", help=CHECK_HELP)] = False,
    prune_gib: Annotated[float | None, option("--prune-gib", metavar="GIB", min=0, help=PRUNE_HELP)] = None,
) -> None:
    from vllm_wsi.store.selection_store import SelectionStore

    if not folder.is_dir():
        raise SettingsError(f"{folder}: found no folder, wanted a selection store")
    found = SelectionStore(folder)
    if check:
        good, removed = found.check()
        print(f"checked: {good} good, {removed} damaged or foreign and removed")
    if prune_gib is not None:
        found.prune(int(prune_gib * (1 << 30)))
    files = list(found.files())
    for kind, what in (("selection", "selections"), ("scores", "slides' scores"), ("aside", "unfinished files")):
        sizes = [file.num_bytes for file in files if file.kind == kind]
        print(f"{what:<17}{len(sizes):>10,}{sum(sizes) / (1 << 20):>12,.1f} MiB")
    if others := [file for file in files if file.kind not in ("selection", "scores", "aside")]:
        print(f"{'other files':<17}{len(others):>10,}")
        raise typer.Exit(1)
