"""The safetensors files of a model, in a directory or a hub repository."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from vllm_wsi.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(
    model: str, revision: str | None = None, wanted: Callable[[str], bool] = lambda name: True
) -> list[Path]:
    """The files that hold the wanted weights; files with none of them are not fetched. Its callers use `loading`.

    Raises:
        CheckpointError: the model has no safetensors.
    """
    find = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if (single := cached_file(model, SINGLE, **find)) is not None:
        return [Path(single)]
    if (index := cached_file(model, INDEX, **find)) is not None:
        names = json.loads(Path(index).read_text())["weight_map"]
        shards = sorted({file for key, file in names.items() if wanted(key)})
        return [Path(cached_file(model, shard, revision=revision)) for shard in shards]
    raise CheckpointError(f"found neither {SINGLE} nor {INDEX}, wanted a checkpoint in safetensors")


def weights_sha256(model: str, revision: str | None = None) -> str:
    """Names, shapes, dtypes and values of all weights in one sha256, however they are spread over files.

    Raises:
        CheckpointError: the model has no safetensors.
    """
    places: dict[str, Path] = {}
    for path in weight_files(model, revision):
        with safe_open(path, "pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), path)
    digest = hashlib.sha256()
    for name, path in sorted(places.items()):
        with safe_open(path, "pt") as tensors:
            tensor = tensors.get_tensor(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
