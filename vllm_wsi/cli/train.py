"""`vllm-wsi train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from vllm_wsi.errors import SettingsError, needs_extra

from .options import EncoderMismatch, TissueDir, argument, hide_transformers_progress, option

if TYPE_CHECKING:
    from vllm_wsi.training.settings import TrainSettings

LEFT_OUT = {"tissue": ("fold", "--fold"), "kather": ("leave_out", "--leave-out")}
"""Generator of real tissue -> what of it training does not see: the generator's argument, and the option."""


def train(
    config: Annotated[
        str,
        argument(metavar="CONFIG", help="YAML file, or `haystack`, `tissue` or `kather`: recipes of this package"),
    ],
    out: Annotated[Path, option("--out", metavar="DIR", help="a run that was stopped there goes on")],
    encoder_mismatch: EncoderMismatch = "refuse",
    seed: Annotated[int | None, option("--seed", help="instead of the configuration's")] = None,
    tissue_dir: TissueDir = None,
    fold: Annotated[int | None, option("--fold", help="of tissue's patients, which training does not see")] = None,
    leave_out: Annotated[
        str | None, option("--leave-out", metavar="SLIDE", help="of kather, which training does not see")
    ] = None,
) -> None:
    hide_transformers_progress()
    from vllm_wsi.haystack.recipe import GENERATORS, recipe
    from vllm_wsi.tissue.tissue_generator import GENERATORS as TISSUE_GENERATORS
    from vllm_wsi.tissue.tissue_recipe import TISSUE_RECIPES

    with needs_extra("train"):
        from vllm_wsi.training import train as training
        from vllm_wsi.training.settings import load_settings

    settings = load_settings(TISSUE_RECIPES.get(config) or recipe(config))
    _place_on_tissue(settings, config, tissue_dir, {"tissue": fold, "kather": leave_out})
    if seed is not None:
        settings.seed = seed
    if encoder_mismatch == "allow":
        settings.encoder_mismatch = "allow"
    checkpoint = training.train(settings, out, {**GENERATORS, **TISSUE_GENERATORS})
    print(f"{checkpoint}: serve it with\n  vllm serve {checkpoint} --plugin vllm_wsi --allowed-local-media-path DIR")


def _place_on_tissue(
    settings: TrainSettings, config: str, tissue_dir: Path | None, left_out: dict[str, int | str | None]
) -> None:
    """Tells every stage on real tissue the folder, and what it does not see.

    Raises:
        SettingsError: an option that no stage takes, or a stage without a folder or without what is left out.
    """
    for name, (argument_name, flag) in LEFT_OUT.items():
        stages = [stage for stage in settings.all_stages() if (stage.data.generate or {}).get("name") == name]
        if left_out[name] is not None and not stages:
            raise SettingsError(f"{config}: found no stage on {name}, wanted one beside {flag}")
        given = {"data": None if tissue_dir is None else str(tissue_dir), argument_name: left_out[name]}
        for stage in stages:
            changes = {key: value for key, value in given.items() if value is not None}
            stage.data.generate = (stage.data.generate or {}) | changes
            if "data" not in stage.data.generate:
                raise SettingsError(f"{config}: {stage.name}: found no data, wanted --tissue-dir (docs/tissue.md)")
            if name == "kather":
                _name_encoder(settings, config, stage.data.generate.get("leave_out"))
    names = {(stage.data.generate or {}).get("name") for stage in settings.all_stages()}
    if tissue_dir is not None and names.isdisjoint(LEFT_OUT):
        raise SettingsError(f"{config}: found no stage on tissue, wanted one beside --tissue-dir")


def _name_encoder(settings: TrainSettings, config: str, leave_out: str | None) -> None:
    """Kather's features are named after the slide that is left out: so is the encoder of a model that says none."""
    from vllm_wsi.tissue.kather import kather_encoder

    if leave_out is None:
        raise SettingsError(f"{config}: found no slide to leave out, wanted --leave-out (docs/tissue.md)")
    if settings.model.new is not None and settings.model.new.encoder is None:
        settings.model = settings.model.changed(new=settings.model.new.changed(encoder=kather_encoder(leave_out)))
