"""What a run trained, apart from the decoder that it started from: `trained/` beside `checkpoint/`."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vllm_wsi.errors import WsiError
from vllm_wsi.model.checkpoint import SCORER_PREFIX, loading
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.lora import LowRank, sum_of
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.trained_parts import PROJECTOR_PREFIX, BaseDecoder, TrainedParts, write_trained_parts
from vllm_wsi.model.weight_files import weights_sha256
from vllm_wsi.parts.smollm2 import resolve_decoder

from .settings import LoraSettings, StageSettings, TrainSettings
from .trainer import WEIGHTS

logger = logging.getLogger(__name__)

LORA_NAME = re.compile(r"^model\.language_model\.base_model\.model\.(.+)\.lora_([AB])\.default\.weight$")


def export_parts(
    settings: TrainSettings, model: SparseWSIForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, output: Path
) -> Path | None:
    """Writes `trained/` into a run's directory, of what its stages saved.

    Args:
        model: as all stages left it, with its `generation_config`.

    Returns:
        The directory; None, and a line in the log, where the run's decoder is no plain one with adapters.
    """
    folder = output / "trained"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped just after it
    if (reason := _reason_against(settings)) is not None:
        logger.info("%s: not written, since %s", folder, reason)
        return None
    try:
        base = _base(settings)
        changes = [
            stage_lora(output / "stages" / f"{number}-{stage.name}" / "final", stage.lora)
            for number, stage in enumerate(settings.stages)
            if stage.lora is not None
        ]
    except WsiError as error:  # must not take the checkpoint with it
        logger.warning("%s: not written: %s", folder, error)
        return None
    weights = {
        name: tensor.float()
        for name, tensor in model.state_dict().items()
        if name.startswith((SCORER_PREFIX, PROJECTOR_PREFIX))
    }
    assert isinstance(tokenizer.chat_template, str)
    parts = TrainedParts(model.config, base, weights, sum_of(changes), tokenizer.chat_template, model.generation_config)
    write_trained_parts(folder, parts, card(settings, base, model.config))
    return folder


def stage_lora(final: Path, settings: LoraSettings) -> dict[str, LowRank]:
    """The adapter that a stage saved in its `final/`, with its scale in the second matrix.

    Raises:
        WsiError: it adapts something other than linear layers.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(final / WEIGHTS).items():
        if "lora_" not in name:
            continue
        if (match := LORA_NAME.match(name)) is None:
            raise WsiError(f"{final / WEIGHTS}: found {name}, wanted adapters of linear layers alone")
        halves.setdefault(match[1], {})[match[2]] = tensor.float()
    scale = settings.alpha / settings.r
    return {name: LowRank(found["A"], found["B"] * scale) for name, found in halves.items()}


def _reason_against(settings: TrainSettings) -> str | None:
    if settings.model.decoder is None:
        return "it started from no plain decoder (`model: {decoder: ...}`)"
    whole = [stage.name for stage in settings.stages if "decoder" in stage.train]
    return f"stage {whole[0]} trained the whole decoder" if whole else None


def _base(settings: TrainSettings) -> BaseDecoder:
    assert settings.model.decoder is not None
    name, revision = resolve_decoder(settings.model.decoder), settings.model.revision
    with loading(settings.model.decoder):
        return BaseDecoder(settings.model.decoder, revision, weights_sha256(name, revision))


def card(settings: TrainSettings, base: BaseDecoder, config: SparseWSIConfig) -> str:
    """A model card, to be filled in before the parts are given away."""
    at = f" at revision {base.revision}" if base.revision else ""
    firsts = [] if settings.scorer_run is None else settings.scorer_run.all_stages()
    stages = "\n".join(
        [f"- {_stage_line(stage)}, over a small decoder that taught the scorer" for stage in firsts]
        + [f"- {_stage_line(stage)}" for stage in settings.stages]
    )
    return f"""\
# Trained parts of a slide language model

Scorer, projector and adapters alone. They stand on the decoder `{base.name}`{at}, whose weights have the sha256
`{base.sha256}`, and take features of `{config.encoder or "an encoder that was not recorded"}`
({config.feature_dim} values a patch).

`vllm-wsi assemble DIRECTORY --out CHECKPOINT` makes a checkpoint of both, which `vllm serve CHECKPOINT --plugin
vllm_wsi` takes.

## Training

Seed {settings.seed}. Stages:

{stages}

## Data, attribution, limits, numbers

Not stated. For research, not for diagnosis.
"""


def _stage_line(stage: StageSettings) -> str:
    files = ", ".join(path.name for path in stage.data.questions)
    source = files or f"generated by {(stage.data.generate or {}).get('name')}"
    learning = [*stage.train, *([f"LoRA of rank {stage.lora.r}"] if stage.lora else [])]
    return f"{stage.name}: {', '.join(learning)}; {stage.steps} steps of {stage.batch_size}; questions: {source}"
