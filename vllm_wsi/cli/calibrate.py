"""`vllm-wsi calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vllm_wsi.errors import SettingsError, needs_extra

from .options import TissueDir, argument, hide_transformers_progress, option

if TYPE_CHECKING:
    from vllm_wsi.study.calibrate import CalibrateSettings

TISSUES = ("tissue", "kather")

CONFIG_HELP = "YAML file with training, validation and absent, or `haystack` or `tissue`: those of this package"
CHECKPOINT_HELP = "directory; gets calibration.json"


def calibrate(
    config: Annotated[str, argument(metavar="CONFIG", help=CONFIG_HELP)],
    checkpoint: Annotated[Path, option("--checkpoint", metavar="DIR", help=CHECKPOINT_HELP)],
    tissue_dir: TissueDir = None,
) -> None:
    hide_transformers_progress()
    from vllm_wsi.haystack.recipe import CALIBRATE_HAYSTACK, GENERATORS
    from vllm_wsi.tissue.tissue_generator import GENERATORS as TISSUE_GENERATORS
    from vllm_wsi.tissue.tissue_recipe import CALIBRATE_TISSUE

    with needs_extra("train"):
        from vllm_wsi.study.calibrate import calibrate as fit
        from vllm_wsi.study.calibrate import load_calibrate_settings
        from vllm_wsi.training.train import items_of

    packaged = {"haystack": CALIBRATE_HAYSTACK, "tissue": CALIBRATE_TISSUE}
    settings = load_calibrate_settings(packaged.get(config) or Path(config))
    if tissue_dir is not None:
        _place_on_tissue(settings, config, tissue_dir)
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


def _place_on_tissue(settings: CalibrateSettings, config: str, folder: Path) -> None:
    """Tells what is generated of real tissue its folder.

    Raises:
        SettingsError: nothing is.
    """
    given = [
        data for data in (*settings.training, *settings.validation) if (data.generate or {}).get("name") in TISSUES
    ]
    if not given:
        raise SettingsError(f"{config}: found nothing on tissue, wanted some beside --tissue-dir")
    for data in given:
        data.generate = (data.generate or {}) | {"data": str(folder)}
