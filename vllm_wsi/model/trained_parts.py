"""What training changed, without the decoder that it stands on: the form in which a trained model ships.

A directory of a few megabytes:

- `config.json`: a `SparseWSIConfig` whose `base_decoder` names the decoder, with the sha256 of its weights;
- `model.safetensors`: `scorer.*` and `projector.*`;
- `adapter_config.json`, `adapter_model.safetensors`: the decoder's LoRA in peft's form, if it was trained;
- `chat_template.jinja`, `generation_config.json`: prompts and the end of an answer, as in training;
- `README.md`: the model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from vllm_wsi.errors import CheckpointError
from vllm_wsi.files import new_folder, write_atomically

from .checkpoint import SCORER_PREFIX, loading, read_config
from .config import SparseWSIConfig
from .lora import LowRank, read_lora, write_lora
from .weight_files import SINGLE

PROJECTOR_PREFIX = "projector."
CONFIG, CHAT_TEMPLATE_FILE, CARD = "config.json", "chat_template.jinja", "README.md"


class BaseDecoder(NamedTuple):
    """The decoder that parts were trained over."""

    name: str  # directory, hub name, or a name that `parts.smollm2.resolve_decoder` knows
    revision: str | None
    sha256: str  # of its weights (`weights_sha256`)


class TrainedParts(NamedTuple):
    """All that training made."""

    config: SparseWSIConfig
    base: BaseDecoder
    weights: Mapping[str, Tensor]  # scorer.* and projector.*
    lora: Mapping[str, LowRank]  # empty: the decoder is as it was
    chat_template: str
    generation_config: GenerationConfig


def write_trained_parts(folder: Path, parts: TrainedParts, card: str) -> None:
    """Writes a directory of trained parts, whole or not at all.

    Args:
        folder: does not exist yet.
        card: the model card, Markdown.
    """
    with new_folder(folder) as partial:
        config = over_decoder(parts.config, parts.config.text_config)
        config.base_decoder = parts.base._asdict()
        config.save_pretrained(partial)
        parts.generation_config.save_pretrained(partial)
        state = {name: tensor.detach().clone().contiguous() for name, tensor in parts.weights.items()}
        save_file(state, partial / SINGLE, metadata={"format": "pt"})
        if parts.lora:
            write_lora(partial, parts.lora, parts.base.name)
        write_atomically(partial / CHAT_TEMPLATE_FILE, parts.chat_template.encode())
        write_atomically(partial / CARD, card.encode())


def read_trained_parts(folder: Path) -> TrainedParts:
    """Reads what `write_trained_parts` wrote.

    Raises:
        CheckpointError: the directory is no such one, or damaged.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: found no {CONFIG} in it, wanted a directory of trained parts")
    config = read_config(str(folder))
    base = _base_decoder(folder, getattr(config, "base_decoder", None))
    with loading(str(folder)):
        weights = load_file(folder / SINGLE)
        generation_config = GenerationConfig.from_pretrained(folder)
        chat_template = (folder / CHAT_TEMPLATE_FILE).read_text()
    if odd := [name for name in weights if not name.startswith((SCORER_PREFIX, PROJECTOR_PREFIX))]:
        raise CheckpointError(f"{folder / SINGLE}: found {odd[0]}, wanted weights of scorer and projector alone")
    return TrainedParts(config, base, weights, read_lora(folder), chat_template, generation_config)


def over_decoder(config: SparseWSIConfig, text_config: PreTrainedConfig) -> SparseWSIConfig:
    """A copy of the configuration over another decoder's, which is stripped of where it was read."""
    decoder = {key: value for key, value in text_config.to_dict().items() if key != "_name_or_path"}
    return SparseWSIConfig.from_dict(config.to_dict() | {"text_config": decoder})


def _base_decoder(folder: Path, found: Any) -> BaseDecoder:
    if not isinstance(found, dict) or found.keys() != set(BaseDecoder._fields):
        wanted = ", ".join(BaseDecoder._fields)
        raise CheckpointError(f"{folder / CONFIG}: base_decoder: found {found!r}, wanted a mapping of {wanted}")
    return BaseDecoder(**found)
