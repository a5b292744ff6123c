"""LoRA adapters in peft's form: read, written, summed and merged without peft, which serving does not need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_wsi.errors import CheckpointError
from vllm_wsi.files import write_atomically

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of peft's names, before the name in the decoder
HALVES = {".lora_A.weight": 0, ".lora_B.weight": 1}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that `--max-lora-rank` takes
# What changes the meaning of the two matrices, and is not read here.
REFUSED = (
    "use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication",
    "fan_in_fan_out", "trainable_token_indices",
)  # fmt: skip


class LowRank(NamedTuple):
    """A change of one linear layer: weight += b @ a."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank], with the scale in it


Lora = Mapping[str, LowRank]
"""By the name of the layer in the decoder."""


def sum_of(changes: Sequence[Lora]) -> dict[str, LowRank]:
    """Several changes as one: ranks are put side by side, so the sum is exact."""
    names = sorted({name for change in changes for name in change})
    each = {name: [change[name] for change in changes if name in change] for name in names}
    return {
        name: LowRank(torch.cat([one.a for one in found]), torch.cat([one.b for one in found], dim=1))
        for name, found in each.items()
    }


def write_lora(folder: Path, lora: Lora, base: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which peft and `vllm serve --lora-modules` read.

    Every layer gets the largest rank, with zeros behind its own: a rank for each layer is not read everywhere. The
    scale is in the matrices, so `lora_alpha` is the rank.

    Args:
        base: of the decoder that the adapter belongs to, for the record.
    """
    rank = max(len(one.a) for one in lora.values())
    state = {}
    for name, one in lora.items():
        room = rank - len(one.a)
        state[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(one.a, (0, 0, 0, room)).contiguous()
        state[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(one.b, (0, room)).contiguous()
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": rank,
        "lora_dropout": 0.0, "bias": "none", "inference_mode": True, "target_modules": sorted(lora),
    }  # fmt: skip
    write_atomically(folder / ADAPTER_CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def read_lora(folder: Path) -> dict[str, LowRank]:
    """The adapter of a folder; empty where there is none.

    Raises:
        CheckpointError: one that is damaged, or has more than two matrices for each layer.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file() and not (folder / ADAPTER_CONFIG).is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
        scale = config["lora_alpha"] / config["r"]
        state = load_file(file)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: found no LoRA adapter that loads ({error!r}), wanted one of peft") from error
    if odd := [key for key in REFUSED if config.get(key)]:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {odd[0]}: found {config[odd[0]]!r}, wanted a plain LoRA")
    halves: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        ending = next((one for one in HALVES if name.endswith(one)), None)
        if ending is None or not name.startswith(PREFIX) or tensor.ndim != 2:
            raise CheckpointError(
                f"{file}: found {name} {tuple(tensor.shape)}, wanted matrices lora_A and lora_B alone"
            )
        halves.setdefault(name.removeprefix(PREFIX).removesuffix(ending), {})[HALVES[ending]] = tensor
    for name, found in halves.items():
        if len(found) != 2 or len(found[0]) != found[1].shape[1]:
            shapes = [tuple(half.shape) for half in found.values()]
            raise CheckpointError(f"{file}: {name}: found {shapes}, wanted lora_A [rank, in] and lora_B [out, rank]")
    return {name: LowRank(found[0], found[1] * scale) for name, found in sorted(halves.items())}


@torch.no_grad()
def merge_lora(decoder: Any, lora: Lora, where: str) -> None:
    """Adds an adapter to a decoder's weights, in place: summed in fp64 and rounded once to the weights' dtype, so that
    the order in which a machine adds does not show.

    Raises:
        CheckpointError: the decoder has no such layer, or one of another shape.
    """
    modules = dict(decoder.named_modules())
    embeddings = decoder.get_input_embeddings().weight
    for name, one in lora.items():
        layer, shape = modules.get(name), (len(one.b), one.a.shape[1])
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(f"{where}: {name}: found no such linear layer in the decoder, wanted one")
        if tuple(layer.weight.shape) != shape:
            raise CheckpointError(f"{where}: {name}: found shape {shape}, wanted {tuple(layer.weight.shape)}")
        if layer.weight is embeddings:
            raise CheckpointError(f"{where}: {name}: found a change of tied embeddings, wanted other layers alone")
        layer.weight.copy_(layer.weight.double() + one.b.double() @ one.a.double())


def served_rank(folder: Path) -> int:
    """The smallest `--max-lora-rank` of vLLM that holds a folder's adapter."""
    rank = max(len(one.a) for one in read_lora(folder).values())
    return next((one for one in VLLM_RANKS if one >= rank), rank)
