"""`vllm-wsi calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from vllm_wsi.errors import needs_extra

from .options import argument, hide_transformers_progress, option

CONFIG_HELP = "YAML file with training, validation and absent, or `haystack`: that of the demo checkpoint"
CHECKPOINT_HELP = "directory; gets calibration.json"


def calibrate(
    config: Annotated[str, argument(metavar="CONFIG", help=CONFIG_HELP)],
    checkpoint: Annotated[Path, option("--checkpoint", metavar="DIR", help=CHECKPOINT_HELP)],
) -> None:
    hide_transformers_progress()
    from vllm_wsi.haystack.recipe import CALIBRATE_HAYSTACK, GENERATORS
    from vllm_wsi.tissue.tissue_generator import GENERATORS as TISSUE_GENERATORS

    with needs_extra("train"):
        from vllm_wsi.study.calibrate import calibrate as fit
        from vllm_wsi.study.calibrate import load_calibrate_settings
        from vllm_wsi.training.train import items_of

    settings = load_calibrate_settings(CALIBRATE_HAYSTACK if config == "haystack" else Path(config))
    generators = {**GENERATORS, **TISSUE_GENERATORS}
    training, validation = (
        [item for one in data for item in items_of(one, generators)]
        for data in (settings.training, settings.validation)
    )
    found, path = fit(checkpoint, training, validation, settings.absent)
    print(
        f"{path}: {found.num_slides} validation slides of {found.num_patches[0]} to {found.num_patches[1]} patches; "
        f"temperature {found.temperature:.2f}, enough sufficiency {found.enough:.2f}"
    )
