"""`vllm-wsi convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Encoder, Ray, argument, chosen_executor, option
from .slides_bar import slides_bar

DTYPE_HELP = "float16, or same as in the source (default same); a value that float16 cannot hold is an error"


def convert(
    features: Annotated[list[Path], argument(metavar="FEATURES", help="feature file of any format, or folder of them")],
    out: Annotated[Path, option("--out", metavar="DIR", help="what is there already is skipped")],
    dtype: Annotated[Literal["same", "float16"], option("--dtype", help=DTYPE_HELP)] = "same",
    encoder: Encoder = None,
    workers: Annotated[
        int | None, option("--workers", metavar="N", min=1, help="files at once (default: by cores)")
    ] = None,
    ray: Ray = None,
) -> None:
    from vllm_wsi.slides.convert_features import SUMMARY, convert_many, find_conversions
    from vllm_wsi.slides.many_slides import count_by_status, write_summary

    jobs = find_conversions(features, out)
    out.mkdir(parents=True, exist_ok=True)
    with chosen_executor(ray, workers, out) as executor, slides_bar(len(jobs)) as (_, ended):
        outcomes = convert_many(jobs, encoder, dtype, executor, ended)
    counts = count_by_status(outcomes)
    write_summary(out / SUMMARY, outcomes)
    print(f"{counts['done']} done, {counts['skipped']} skipped, {counts['failed']} failed; see {out / SUMMARY}")
    if counts["failed"]:
        raise typer.Exit(1)
