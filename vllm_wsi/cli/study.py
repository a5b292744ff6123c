"""`vllm-wsi study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_wsi.errors import SettingsError, needs_extra

from .options import EncoderMismatch, TissueDir, hide_transformers_progress, option

SLIDES = "1000:192,4000:96,16000:48,100000:24"
TISSUE_SLIDES = "256:10,1024:10,all:5,4096:5,natural:20"
KATHER_SLIDES = "128:20"
SHARES = "0.002,0.01,0.05,0.1,0.3"
KINDS = "presence,presence_choice,share"
ABLATION_SLIDES = "1000:192,4000:96,100000:16"


OF_DATA = {
    "haystack": ("questions", "features", "haystack_knobs", "ablations", "seeds", "ablation_slides", "device"),
    "tissue": ("tissue_dir", "fold", "shares", "kinds", "unseen_wording", "device"),
    "kather": ("tissue_dir", "leave_out", "unseen_wording"),
}
"""Options that mean something with some kinds of data only."""


# Many parameters: a command has one for each of its options.
def study(
    context: typer.Context,
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
    slides: Annotated[
        str | None,
        option(
            "--slides",
            metavar="N:COUNT,...",
            help=f"of haystack ({SLIDES}), of tissue ({TISSUE_SLIDES}), of kather ({KATHER_SLIDES})",
        ),
    ] = None,
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
    data: Annotated[
        Literal["haystack", "tissue", "kather"],
        option("--data", help="virtual slides, or real labelled tissue, which needs --tissue-dir and --checkpoint"),
    ] = "haystack",
    tissue_dir: TissueDir = None,
    fold: Annotated[int, option("--fold", help="of tissue's patients, which the checkpoint never saw (default 0)")] = 0,
    leave_out: Annotated[
        str, option("--leave-out", metavar="SLIDE", help="of kather, which the checkpoint never saw (default 01)")
    ] = "01",
    shares: Annotated[
        str, option("--shares", metavar="SHARE,...", help=f"of tumour on tissue's slides ({SHARES})")
    ] = SHARES,
    kinds: Annotated[
        str, option("--kinds", metavar="KIND,...", help=f"of questions about tissue's slides ({KINDS})")
    ] = KINDS,
    unseen_wording: Annotated[
        bool, option("--unseen-wording", help="ask in wordings that training never uses")
    ] = False,
) -> None:
    hide_transformers_progress()
    _refuse_options_of_other_data(context, data)
    if data != "haystack":
        if tissue_dir is None or checkpoint is None:
            raise SettingsError(f"--data {data}: found no --tissue-dir or no --checkpoint beside it, wanted both")
        with needs_extra("study"):
            from vllm_wsi.study.tissue_classes import ClassStudySettings, write_class_study
            from vllm_wsi.study.tissue_settings import TissueStudySettings
            from vllm_wsi.study.write_tissue import write_tissue_study

        if data == "kather":
            length, _, count = (slides or KATHER_SLIDES).partition(":")
            classes = ClassStudySettings(
                out=out,
                checkpoint=checkpoint,
                tissue_dir=tissue_dir,
                leave_out=leave_out,
                num_patches=length,
                count=count,
                unseen_wording=unseen_wording,
                seed=seed,
                encoder_mismatch=encoder_mismatch,
            )
            for path in write_class_study(classes):
                print(path)
            return
        tissue = TissueStudySettings(
            out=out,
            checkpoint=checkpoint,
            tissue_dir=tissue_dir,
            slides=slides or TISSUE_SLIDES,
            shares=shares,
            kinds=kinds.split(","),
            fold=fold,
            unseen_wording=unseen_wording,
            seed=seed,
            encoder_mismatch=encoder_mismatch,
            device=device,
        )
        for path in write_tissue_study(tissue):
            print(path)
        return
    with needs_extra("study"):
        from vllm_wsi.study.settings import StudySettings
        from vllm_wsi.study.write_study import write_study

    settings = StudySettings(
        out=out,
        checkpoint=checkpoint,
        questions=questions,
        features=features,
        slides=slides or SLIDES,
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


def _refuse_options_of_other_data(context: typer.Context, data: str) -> None:
    for name in {name for names in OF_DATA.values() for name in names} - set(OF_DATA[data]):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            wanted = " or ".join(other for other, names in OF_DATA.items() if name in names)
            raise SettingsError(f"--{name.replace('_', '-')}: found it beside --data {data}, wanted --data {wanted}")
