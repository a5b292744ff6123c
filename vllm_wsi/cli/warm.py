"""`vllm-wsi warm`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_wsi.errors import SettingsError

from .options import DEVICE_HELP, Encoder, EncoderMismatch, Ray, argument, chosen_executor, option
from .slides_bar import slides_bar

if TYPE_CHECKING:
    from vllm_wsi.store.store_settings import StoreSettings

STORE_HELP = "folder of the selection store (default: VLLM_WSI_STORE)"
K_HELP = "patches to keep (default: the checkpoint's)"


# Many parameters: a command has one for each of its options.
def warm(
    features: Annotated[list[Path], argument(metavar="FEATURES", help="feature file, or folder of them")],
    checkpoint: Annotated[str, option("--checkpoint", metavar="C", help="directory or hub name")],
    store: Annotated[Path | None, option("--store", metavar="DIR", help=STORE_HELP)] = None,
    store_gib: Annotated[float | None, option("--store-gib", help="bound of the store (default 10)")] = None,
    k: Annotated[
        int | None, option("-k", metavar="K", min=1, help="patches to keep (default: the checkpoint's)")
    ] = None,
    encoder: Encoder = None,
    encoder_mismatch: EncoderMismatch = "refuse",
    device: Annotated[str, option("--device", help=DEVICE_HELP)] = "auto",
    workers: Annotated[
        int | None, option("--workers", metavar="N", min=1, help="slides at once (default: by cores)")
    ] = None,
    ray: Ray = None,
    summary: Annotated[Path | None, option("--summary", metavar="FILE.csv", help="a row for each slide")] = None,
) -> None:
    from vllm_wsi.slides.many_slides import count_by_status, write_summary
    from vllm_wsi.store.warm import WarmSettings, find_features, warm_many

    settings = WarmSettings(checkpoint, named_store(store, store_gib), k, encoder, device, encoder_mismatch)
    files = find_features(features)
    with chosen_executor(ray, workers, settings.store.folder) as executor, slides_bar(len(files)) as (_, ended):
        outcomes = warm_many(files, settings, executor, ended)
    counts = count_by_status(outcomes)
    if summary is not None:
        write_summary(summary, outcomes)
    print(
        f"{counts['done']} done, {counts['skipped']} skipped, {counts['failed']} failed; store {settings.store.folder}"
    )
    if counts["failed"]:
        raise typer.Exit(1)


def named_store(folder: Path | None, gib: float | None = None) -> StoreSettings:
    """Raises SettingsError where neither an option nor the environment names one."""
    from vllm_wsi.store.store_settings import store_settings

    found = store_settings(folder, gib)
    if found is None:
        raise SettingsError("--store: found no folder, wanted one, here or in VLLM_WSI_STORE")
    return found
