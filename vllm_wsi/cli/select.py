"""`vllm-wsi select`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Literal

from vllm_wsi.errors import needs_extra

from .options import DEVICE_HELP, Encoder, EncoderMismatch, argument, option

logger = logging.getLogger(__name__)

K_HELP = "patches to keep, summary tokens among them (default: the checkpoint's)"
QUESTION_HELP = "that the patches are chosen for, with a checkpoint whose scorer hears it (default: none is asked)"
UNIT_HELP = "of the coordinates, where the file does not say it"
GUESS_HELP = "draw upon --slide by a unit or patch size that is only guessed"
ORIGIN_HELP = "what GeoJSON counts from: the slide's bounds, as QuPath does (default), or openslide's pixel 0, 0"


# Many parameters: a command has one for each of its options.
def select(
    file: Annotated[Path, argument(metavar="FILE")],
    checkpoint: Annotated[str, option("--checkpoint", help="directory or hub name")],
    k: Annotated[int | None, option("-k", metavar="K", min=1, help=K_HELP)] = None,
    encoder: Encoder = None,
    question: Annotated[str | None, option("--question", metavar="TEXT", help=QUESTION_HELP)] = None,
    device: Annotated[str, option("--device", help=DEVICE_HELP)] = "auto",
    encoder_mismatch: EncoderMismatch = "refuse",
    geojson: Annotated[Path | None, option("--geojson", metavar="FILE", help="kept patches for QuPath")] = None,
    heatmap: Annotated[
        Path | None, option("--heatmap", metavar="FILE.png", help="all scores by their rank (extra: slides)")
    ] = None,
    montage: Annotated[
        Path | None, option("--montage", metavar="FILE.png", help="the kept patches (extra: slides)")
    ] = None,
    slide: Annotated[
        Path | None, option("--slide", metavar="IMAGE", help="slide image to draw upon (default: none)")
    ] = None,
    mpp: Annotated[
        float | None, option("--mpp", help="microns per level-0 pixel, instead of what the file says")
    ] = None,
    patch_size_level0: Annotated[
        float | None, option("--patch-size-level0", metavar="PX", help="where the file does not say it")
    ] = None,
    coord_unit: Annotated[Literal["px", "um"] | None, option("--coord-unit", help=UNIT_HELP)] = None,
    accept_guess: Annotated[bool, option("--accept-guess", help=GUESS_HELP)] = False,
    geojson_origin: Annotated[Literal["bounds", "slide"], option("--geojson-origin", help=ORIGIN_HELP)] = "bounds",
) -> None:
    from vllm_wsi.slides import open_features
    from vllm_wsi.slides.places import Said, overruled_mpp

    with open_features(file, encoder) as opened:
        # After the file's own errors: these import torch.
        from vllm_wsi.model.checkpoint import load_calibration, load_selector
        from vllm_wsi.model.question_reader import question_query
        from vllm_wsi.selection.calibration import Trust

        selector = load_selector(checkpoint, device, encoder_mismatch=encoder_mismatch)
        query = None if question is None else question_query(selector, checkpoint, question)
        selection = selector.select(opened, k, keep_all_scores=heatmap is not None, query=query)
    said = Said(mpp, patch_size_level0, coord_unit, accept_guess)
    trust = Trust.of(load_calibration(checkpoint, selector.scorer), selection)
    record = selection.record(str(file), said) | trust._asdict()
    if geojson or heatmap or montage:
        with needs_extra("slides"):
            from vllm_wsi.rendering.overlay import SelectionOverlay

        with SelectionOverlay(selection, str(file), slide, said) as overlay:
            if geojson is not None:
                overlay.write_geojson(geojson, geojson_origin == "bounds")
            if heatmap is not None:
                overlay.write_heatmap(heatmap)
            if montage is not None:
                overlay.write_montage(montage)
    print(json.dumps({"file": str(file), "checkpoint": checkpoint, **record}))
    for warning in filter(None, (overruled_mpp(selection.metadata, said), *trust.warnings)):  # JSON hides them
        logger.warning("%s: %s", file, warning)
