"""Training runs that differ in their scorer alone: the same decoder behind each of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.training.settings import TrainSettings
from vllm_wsi.training.train import Generators, train


def trained(
    run: Path, model: Mapping[str, Any], stages: list[dict[str, Any]], seed: int, generators: Generators
) -> Path:
    """The checkpoint of a run, which is made where it is not there yet."""
    checkpoint = run / "checkpoint"
    if not checkpoint.is_dir():
        train(TrainSettings.model_validate({"seed": seed, "model": model, "stages": stages}), run, generators)
    return checkpoint


def begin_with(out: Path, decoder: Path, scorer: dict[str, Any], seed: int) -> Path:
    """Writes that checkpoint with a new scorer of another kind, where it is not there yet."""
    if out.is_dir():
        return out
    read = SparseWSIForConditionalGeneration.from_pretrained(decoder)
    config = SparseWSIConfig.from_dict(read.config.to_dict() | {"scorer": scorer})
    torch.manual_seed(seed)
    model = SparseWSIForConditionalGeneration(config, language_model=read.language_model)
    model.projector.load_state_dict(read.projector.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(out)
    return out
