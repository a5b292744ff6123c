"""`vllm-wsi train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from vllm_wsi.errors import SettingsError, needs_extra

from .options import EncoderMismatch, argument, hide_transformers_progress, option


def train(
    config: Annotated[
        str, argument(metavar="CONFIG", help="YAML file, or `haystack`: how the demo checkpoint was made")
    ],
    out: Annotated[Path, option("--out", metavar="DIR", help="a run that was stopped there goes on")],
    encoder_mismatch: EncoderMismatch = "refuse",
    seed: Annotated[int | None, option("--seed", help="instead of the configuration's")] = None,
    tissue_dir: Annotated[
        Path | None, option("--tissue-dir", metavar="DIR", help="the folder of the labelled tissue (docs/tissue.md)")
    ] = None,
    fold: Annotated[int | None, option("--fold", help="of tissue's patients, which training does not see")] = None,
) -> None:
    hide_transformers_progress()
    from vllm_wsi.haystack.recipe import GENERATORS, recipe
    from vllm_wsi.tissue.tissue_generator import GENERATORS as TISSUE_GENERATORS

    with needs_extra("train"):
        from vllm_wsi.training import train as training
        from vllm_wsi.training.settings import load_settings

    settings = load_settings(recipe(config))
    for stage in settings.stages:
        if (asked := stage.data.generate) is not None and asked.get("name") == "tissue":
            asked |= {"data": str(tissue_dir)} if tissue_dir is not None else {}
            asked |= {"fold": fold} if fold is not None else {}
            if "data" not in asked:
                raise SettingsError(f"{config}: {stage.name}: found no data, wanted --tissue-dir (docs/tissue.md)")
    if seed is not None:
        settings.seed = seed
    if encoder_mismatch == "allow":
        settings.encoder_mismatch = "allow"
    checkpoint = training.train(settings, out, {**GENERATORS, **TISSUE_GENERATORS})
    print(f"{checkpoint}: serve it with\n  vllm serve {checkpoint} --plugin vllm_wsi --allowed-local-media-path DIR")
