"""`vllm-wsi study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from vllm_wsi.errors import needs_extra

from .options import EncoderMismatch, hide_transformers_progress, option

SLIDES = "1000:192,4000:96,16000:48,100000:24"
ABLATION_SLIDES = "1000:192,4000:96,100000:16"


# Many parameters: a command has one for each of its options.
def study(
    out: Annotated[Path, option("--out", metavar="DIR")],
    checkpoint: Annotated[
        str | None, option("--checkpoint", metavar="DIR", help="(default: the demo checkpoint)")
    ] = None,
    questions: Annotated[
        Path | None,
        option("--questions", metavar="FILE", help="SlideBench .csv (default: haystack's test split)"),
    ] = None,
    features: Annotated[
        Path | None, option("--features", metavar="DIR", help="feature files of the questions' slides")
    ] = None,
    slides: Annotated[str, option("--slides", metavar="N:COUNT,...", help=f"of haystack ({SLIDES})")] = SLIDES,
    haystack_knobs: Annotated[
        str | None,
        option("--haystack-knobs", metavar="N:COUNT,...", help="also haystack made harder, one knob at a time"),
    ] = None,
    ablations: Annotated[
        str | None,
        option("--ablations", metavar="CONFIG", help="also train every arm of the last stage of this recipe"),
    ] = None,
    seeds: Annotated[int, option("--seeds", help="of the ablations (default 5)")] = 5,
    ablation_slides: Annotated[
        str, option("--ablation-slides", metavar="N:COUNT,...", help=f"({ABLATION_SLIDES})")
    ] = ABLATION_SLIDES,
    seed: Annotated[int, option("--seed", help="of random selections and resampling")] = 0,
    encoder_mismatch: EncoderMismatch = "refuse",
    device: Annotated[Literal["cpu", "cuda"], option("--device", help="of the model (default cpu)")] = "cpu",
) -> None:
    hide_transformers_progress()
    with needs_extra("study"):
        from vllm_wsi.study.settings import StudySettings
        from vllm_wsi.study.write_study import write_study

    settings = StudySettings(
        out=out,
        checkpoint=checkpoint,
        questions=questions,
        features=features,
        slides=slides,
        haystack_knobs=haystack_knobs,
        ablations=ablations,
        seeds=seeds,
        ablation_slides=ablation_slides,
        seed=seed,
        encoder_mismatch=encoder_mismatch,
        device=device,
    )
    for path in write_study(settings):
        print(path)
