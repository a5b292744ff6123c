"""`vllm-wsi doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import Encoder, EncoderMismatch, argument, option


def doctor(
    files: Annotated[list[Path], argument(metavar="FILE")],
    encoder: Encoder = None,
    checkpoint: Annotated[
        str | None, option("--checkpoint", metavar="C", help="directory or hub name: do the features fit it?")
    ] = None,
    encoder_mismatch: EncoderMismatch = "refuse",
    as_json: Annotated[bool, option("--json", help="one JSON object for each file")] = False,
) -> None:
    from vllm_wsi.slides.doctor import Checkpoint, examine

    wanted, failed = None, False
    if checkpoint is not None:
        from vllm_wsi.model.checkpoint import read_config

        config = read_config(checkpoint)
        wanted = Checkpoint(checkpoint, config.feature_dim, config.encoder_check(encoder_mismatch))
    for file in files:
        report = examine(file, encoder, wanted)
        print(json.dumps(asdict(report)) if as_json else report.text())
        failed |= report.error is not None
    if failed:
        raise typer.Exit(1)
