"""What a training run is asked to do: the YAML file of `vllm-wsi train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from vllm_wsi.errors import SettingsError
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.settings import Settings
from vllm_wsi.slides.encoder_names import Mismatch

from .sparselearn import SparseLearnSettings

Part = Literal["scorer", "projector", "decoder"]


SCORER_RUN = "scorer"
"""Of a run's directory: the run that made its scorer."""

SCORERS_OWN = ("feature_dim", "encoder", "patch_um", "scorer")
"""Settings of a model that follow from its scorer."""


class ModelSettings(Settings):
    """Where training starts: exactly one of checkpoint, decoder and new."""

    checkpoint: str | None = None
    """A checkpoint of this project: directory or hub name."""
    decoder: str | None = None
    """A text decoder with a chat template: directory or hub name; scorer and projector are new."""
    new: TinySettings | None = None
    """A small model from nothing."""
    revision: str | None = None
    """Of `checkpoint` or `decoder` on the hub."""
    scorer_from: str | None = None
    """With `decoder`: a checkpoint of this project, over whatever decoder, whose trained scorer the run begins with. It
    says feature_dim, encoder, patch_um and scorer."""
    feature_dim: int | None = Field(None, ge=1)
    """With `decoder`: d, the size of a patch feature."""
    encoder: str | None = None
    """With `decoder`: id@revision of the patch encoder."""
    patch_um: float | None = Field(None, gt=0)
    """With `decoder`: edge of the encoder's patches on the glass, in microns."""
    scorer: dict[str, Any] = Field(default_factory=dict)
    """As in the checkpoint's `scorer`."""
    projector: dict[str, Any] = Field(default_factory=dict)
    """As in the checkpoint's `projector`."""
    num_slide_tokens: int = Field(32, ge=1)
    """K, tokens of each slide."""
    summary_tokens: int = Field(0, ge=0)
    """Of K, means of the dropped patches."""
    position_ids: Literal["original", "packed"] = "original"
    """Whether a kept patch keeps its place among the N, or is counted like text."""
    max_slide_positions: int | None = Field(None, ge=1)
    """Positions that the slides of one prompt may take together; none: by the decoder's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The decoder's, also in the checkpoint that the run makes; none: its own. Scorer and projector are float32."""

    @model_validator(mode="after")
    def _one_start(self) -> ModelSettings:
        given = [name for name in ("checkpoint", "decoder", "new") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"found {', '.join(given) or 'none'}, wanted exactly one of checkpoint, decoder, new")
        if self.scorer_from is not None:
            if self.decoder is None:
                raise ValueError(f"scorer_from: found it beside {given[0]}, wanted a decoder to begin with")
            if said := [name for name in SCORERS_OWN if getattr(self, name)]:
                raise ValueError(f"scorer_from: found {', '.join(said)} beside it, wanted what its checkpoint says")
        elif self.decoder is not None and self.feature_dim is None:
            raise ValueError("found a decoder without feature_dim, wanted the size of the patch features beside it")
        if self.summary_tokens and self.decoder is None:
            raise ValueError(
                f"summary_tokens: found {self.summary_tokens} beside {given[0]}, wanted it beside decoder, or in new"
            )
        return self


class DataSettings(Settings):
    """Questions about slides, and how slides are read."""

    questions: list[Path] = Field(default_factory=list)
    """Files of SlideInstruct (.json) or SlideBench (.csv)."""
    features: Path | None = None
    """Directory of the feature files."""
    generate: dict[str, Any] | None = None
    """Instead of questions and features: {name: .., arguments} of a generator."""
    max_patches: int = Field(10_240, ge=1)
    """Of longer slides, one patch of each of as many strata is taken, anew in each epoch."""
    stretch_positions: int = Field(0, ge=0)
    """Patches stand, in their order, at random places of a longer slide, of up to so many; 0: at their own."""
    mix_positions: bool = False
    """Half of the sequences have packed positions, whatever the checkpoint says."""
    read_first: bool = True
    """Reads every slide once through before the first step, to name the broken ones; false: only opens it."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if (self.generate is None) == (not self.questions):
            raise ValueError("wanted either questions with features, or generate")
        if self.questions and self.features is None:
            raise ValueError("found questions without features, wanted the directory of feature files")
        return self

    def place_beside(self, path: Path) -> None:
        """Makes paths of a settings file relative to it."""
        self.questions = [path.parent / name for name in self.questions]
        self.features = None if self.features is None else path.parent / self.features


class LoraSettings(Settings):
    """Low-rank adapters on the decoder, merged into it at the end."""

    r: int = Field(64, ge=1)
    """Rank."""
    alpha: int = 128
    """Scale: the adapter's product is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of the adapter's input, in training."""
    target_modules: list[str] | str = "all-linear"
    """Layers of the decoder that get an adapter, as peft names them."""


class StageSettings(Settings):
    """One stage: what learns, from what, how long.

    `train` names the parts that learn; the gate's denoiser learns with the scorer. `learning_rate` holds a rate for
    scorer, denoiser, projector, decoder and lora as far as they learn.

    `selection: hard` trains on what is served: the frozen scorer's `num_slide_tokens` best patches, clean. Without it
    every patch reaches the decoder, through the gate of `sparselearn` where that is given.
    """

    name: str
    """Of the stage's folder and in messages."""
    data: DataSettings
    """What it learns from."""
    train: list[Part]
    """Parts that learn; the gate's denoiser learns with the scorer."""
    sparselearn: SparseLearnSettings | None = None
    """The gate through which every patch reaches the decoder; a scorer learns through it alone."""
    selection: Literal["hard"] | None = None
    """`hard`: the decoder sees what is served, the frozen scorer's best patches, clean."""
    lora: LoraSettings | None = None
    """Adapters on the decoder, merged into it at the end."""
    steps: int = Field(ge=1)
    """Of the optimizer."""
    batch_size: int = Field(ge=1)
    """Sequences in a step, for each process."""
    questions_per_sequence: int = Field(1, ge=1)
    """About the same slides, which are computed once for all of them."""
    learning_rate: dict[Literal["scorer", "denoiser", "projector", "decoder", "lora"], float]
    """A rate for each part that learns."""
    warmup_steps: int = Field(20, ge=0)
    """Over which the rate rises from 0."""
    min_lr_rate: float = 0.05
    """The cosine ends at this share of the rate."""
    weight_decay: float = 0.01
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    save_steps: int = Field(500, ge=1)
    """Steps between two states that a stopped run goes on from."""
    workers: int | None = Field(None, ge=0)
    """Processes that read slides; none: by cores, and 0 without a GPU."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `transformers.TrainingArguments`."""

    @model_validator(mode="after")
    def _consistent(self) -> StageSettings:
        learning = {*self.train, *(["lora"] if self.lora else [])}
        if self.sparselearn is not None and self.sparselearn.denoiser != "none":
            learning.add("denoiser")
        if not learning:
            raise ValueError("train: found nothing, wanted some of scorer, projector, decoder")
        if missing := learning - self.learning_rate.keys():
            raise ValueError(f"learning_rate: found none for {', '.join(sorted(missing))}, wanted one for each part")
        if self.selection == "hard" and (self.sparselearn is not None or "scorer" in self.train):
            found = "sparselearn" if self.sparselearn is not None else "a scorer to train"
            raise ValueError(
                f"selection: found hard beside {found}, wanted a frozen scorer, whose choice has no gradient"
            )
        if "scorer" in self.train and self.sparselearn is None:
            raise ValueError("found a scorer to train without sparselearn, through which alone it learns")
        if self.lora and "decoder" in self.train:
            raise ValueError("found lora and a decoder to train, wanted one of the two")
        return self


class TrainSettings(Settings):
    """A whole run.

    `scorer_run` is a run that comes first, usually over a small decoder from nothing: `model` begins with its scorer
    (`scorer_from`), and its decoder is thrown away. A scorer learns from answers, whoever writes them; a small decoder
    writes them many times cheaper.
    """

    scorer_run: TrainSettings | None = None
    """A run of its own `model` and `stages` that makes the scorer first."""
    model: ModelSettings
    """Where training starts."""
    stages: list[StageSettings] = Field(min_length=1)
    """What is trained, one after the other."""
    seed: int = 0
    """Of new weights, of the order of the data, and of noise."""
    encoder_mismatch: Mismatch = "refuse"
    """What becomes of features of another encoder than the model's."""
    report_to: list[str] = Field(default_factory=list)
    """`tensorboard`, and whatever else transformers knows."""

    @model_validator(mode="before")
    @classmethod
    def _scorer_to_come(cls, values: Any) -> Any:
        """`model` beside a `scorer_run` begins with its scorer, before there is one."""
        if isinstance(values, dict) and values.get("scorer_run") is not None and isinstance(values.get("model"), dict):
            return values | {"model": {"scorer_from": SCORER_RUN} | values["model"]}
        return values

    @model_validator(mode="after")
    def _one_scorer(self) -> TrainSettings:
        if self.scorer_run is not None and self.model.scorer_from != SCORER_RUN:
            raise ValueError(f"model: scorer_from: found {self.model.scorer_from}, wanted none beside scorer_run")
        return self

    def all_stages(self) -> list[StageSettings]:
        """Those of the scorer's run first."""
        return [*(self.scorer_run.all_stages() if self.scorer_run is not None else []), *self.stages]


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises SettingsError where it is none."""
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: found no YAML: {' '.join(str(error).split())}") from error


def load_settings(path: str | Path) -> TrainSettings:
    """Reads a YAML file; paths in it are relative to it.

    Raises:
        SettingsError: the file is no YAML, or one sentence for each key that does not fit.
    """
    path = Path(path)
    settings = TrainSettings.of(read_yaml(path), str(path))
    runs = [settings]
    while runs[-1].scorer_run is not None:
        runs.append(runs[-1].scorer_run)
    for run in runs:
        run.model.checkpoint = _beside(path, run.model.checkpoint)
        if run.scorer_run is None:
            run.model.scorer_from = _beside(path, run.model.scorer_from)
    for stage in settings.all_stages():
        stage.data.place_beside(path)
    return settings


def _beside(path: Path, name: str | None) -> str | None:
    """A directory's path from the settings file on; a hub's name as it is."""
    return str(path.parent / name) if name is not None and (path.parent / name).is_dir() else name
