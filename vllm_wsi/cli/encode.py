"""`vllm-wsi encode`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_wsi.errors import needs_extra

from .options import Ray, argument, chosen_executor, option
from .slides_bar import slides_bar
from .warm import STORE_HELP, named_store

ENCODER_HELP = (
    "colour-texture (built in, for trying things out), efficientnet-lite0 (ImageNet weights, fetched once), a name "
    "such as uni2, conch, virchow2 or gigapath, hf-hub:OWNER/REPO, or a model's directory"
)
PATCH_PX_HELP = "edge of a patch in pixels (default: the encoder's, 224 where it takes any)"
PATCH_MPP_HELP = "microns of such a pixel (default: the encoder's, 0.5 where it takes any: 20x)"
STEP_HELP = "such pixels from one patch to the next; fewer than the edge make patches overlap (default: the edge)"
TISSUE_HELP = "by its distance from the glass, or the whole slide (default otsu)"
CHANNELS_HELP = (
    "names or numbers from 0 of the three that are encoded as red, green and blue, of fluorescence and the like "
    "(default: RGB alone)"
)
WARM_HELP = "also select each new slide for this checkpoint, into the selection store"
QC_HELP = "pictures of tissue and patches; where it is --out, the viewer links them"


# Many parameters: a command has one for each of its options.
def encode(
    slides: Annotated[list[Path], argument(metavar="SLIDE", help="slide image, or folder of them")],
    encoder: Annotated[str, option("--encoder", help=ENCODER_HELP)],
    out: Annotated[Path, option("--out", metavar="DIR", help="what is there already is skipped")],
    mpp: Annotated[
        float | None, option("--mpp", help="microns per pixel of the slides, instead of what they say")
    ] = None,
    patch_px: Annotated[int | None, option("--patch-px", help=PATCH_PX_HELP)] = None,
    patch_mpp: Annotated[float | None, option("--patch-mpp", help=PATCH_MPP_HELP)] = None,
    step: Annotated[int | None, option("--step", metavar="PX", help=STEP_HELP)] = None,
    tissue: Annotated[Literal["otsu", "none"], option("--tissue", help=TISSUE_HELP)] = "otsu",
    channels: Annotated[str | None, option("--channels", metavar="A,B,C", help=CHANNELS_HELP)] = None,
    qc: Annotated[Path | None, option("--qc", metavar="DIR", help=QC_HELP)] = None,
    background: Annotated[float, option("--background", help="largest share beside the tissue (default 0.3)")] = 0.3,
    dtype: Annotated[Literal["float16", "float32"], option("--dtype", help="(default float16)")] = "float16",
    batch_size: Annotated[int, option("--batch-size", help="patches encoded at once (default 32)")] = 32,
    workers: Annotated[
        int | None, option("--workers", metavar="N", min=1, help="slides at once (default: by the encoder)")
    ] = None,
    ray: Ray = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], option("--device")] = "auto",
    warm: Annotated[str | None, option("--warm", metavar="C", help=WARM_HELP)] = None,
    store: Annotated[Path | None, option("--store", metavar="DIR", help=STORE_HELP)] = None,
) -> None:
    with needs_extra("slides"):
        from vllm_wsi.encoding.encode_many import SUMMARY, Encoded, encode_many, find_jobs, nothing
        from vllm_wsi.encoding.encode_slide import EncodeSettings
        from vllm_wsi.encoding.encoders import BUILT_IN
    from vllm_wsi.slides.many_slides import count_by_status, write_summary

    settings = EncodeSettings(
        patch_px=patch_px,
        patch_mpp=patch_mpp,
        step_px=step,
        mpp=mpp,
        tissue=tissue,
        background=background,
        channels=None if channels is None else tuple(channels.split(",")),
        dtype=dtype,
        batch_size=batch_size,
    )
    jobs = find_jobs(slides, out, qc)
    out.mkdir(parents=True, exist_ok=True)
    with chosen_executor(ray, workers, out) as executor:
        afterwards: Callable[[Path], None] = nothing
        if warm is not None:
            from vllm_wsi.store.warm import WarmSettings, warming

            no_gpu = ray is not None and encoder == BUILT_IN  # for a worker of the cluster
            warm_settings = WarmSettings(warm, named_store(store), device="cpu" if no_gpu else device)
            afterwards = warming(warm_settings, executor)
        with slides_bar(len(jobs)) as (bar, ended):

            def progress(done: int, total: int) -> None:
                bar.set_postfix_str(f"{done:,} of {total:,} patches")

            outcomes = encode_many(jobs, encoder, settings, device, executor, ended, progress, afterwards)
    counts = count_by_status(outcomes)
    write_summary(out / SUMMARY, outcomes, Encoded)
    print(f"{counts['done']} done, {counts['skipped']} skipped, {counts['failed']} failed; see {out / SUMMARY}")
    if counts["failed"]:
        raise typer.Exit(1)
