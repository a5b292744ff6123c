"""`vllm-wsi train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from vllm_wsi.errors import SettingsError, needs_extra

from .options import EncoderMismatch, argument, hide_transformers_progress, option


def train(
    config: Annotated[
        str,
        argument(metavar="CONFIG", help="YAML file, or `haystack` or `tissue`: how this package's were made"),
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
    from vllm_wsi.tissue.tissue_recipe import TISSUE_RECIPE

    with needs_extra("train"):
        from vllm_wsi.training import train as training
        from vllm_wsi.training.settings import load_settings

    settings = load_settings(TISSUE_RECIPE if config == "tissue" else recipe(config))
    on_tissue = [stage for stage in settings.all_stages() if (stage.data.generate or {}).get("name") == "tissue"]
    given = {"data": None if tissue_dir is None else str(tissue_dir), "fold": fold}
    changes = {name: value for name, value in given.items() if value is not None}
    if changes and not on_tissue:
        raise SettingsError(f"{config}: found no stage on tissue, wanted one beside --tissue-dir and --fold")
    for stage in on_tissue:
        stage.data.generate = {**(stage.data.generate or {}), **changes}
        if "data" not in stage.data.generate:
            raise SettingsError(f"{config}: {stage.name}: found no data, wanted --tissue-dir (docs/tissue.md)")
    if seed is not None:
        settings.seed = seed
    if encoder_mismatch == "allow":
        settings.encoder_mismatch = "allow"
    checkpoint = training.train(settings, out, {**GENERATORS, **TISSUE_GENERATORS})
    print(f"{checkpoint}: serve it with\n  vllm serve {checkpoint} --plugin vllm_wsi --allowed-local-media-path DIR")
