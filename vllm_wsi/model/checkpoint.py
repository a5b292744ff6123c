"""The scorer of a checkpoint on disk."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from vllm_wsi.selection.scorer import build_scorer
from vllm_wsi.selection.selector import FrozenScorer, SlideSelector, frozen_scorer
from vllm_wsi.slides.encoder_names import EncoderCheck, Mismatch

from .config import SparseWSIConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCORER_PREFIX = "scorer."


def load_scorer(model: str, revision: str | None = None) -> FrozenScorer:
    """Reads the scorer, and nothing else, from a checkpoint directory or a hub repository.

    Raises:
        ValueError: the checkpoint has no scorer, or one that its config does not describe.
    """
    config = SparseWSIConfig.from_pretrained(model, revision=revision)
    find = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if (single := cached_file(model, SINGLE, **find)) is not None:
        files = {Path(single)}
    elif (index := cached_file(model, INDEX, **find)) is not None:
        names = json.loads(Path(index).read_text())["weight_map"]
        shards = {file for key, file in names.items() if key.startswith(SCORER_PREFIX)}
        files = {Path(cached_file(model, shard, revision=revision)) for shard in shards}
    else:
        raise ValueError(f"{model}: found neither {SINGLE} nor {INDEX}, wanted a checkpoint in safetensors")
    state: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            keys = [key for key in tensors.keys() if key.startswith(SCORER_PREFIX)]  # noqa: SIM118
            state |= {key.removeprefix(SCORER_PREFIX): tensors.get_tensor(key) for key in keys}
    scorer = build_scorer(feature_dim=config.feature_dim, **config.scorer)
    try:
        scorer.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{model}: {SCORER_PREFIX}*: found other weights than config.json describes: {reason}"
        ) from error
    return frozen_scorer(scorer)


def load_selector(
    model: str, device: str = "cpu", revision: str | None = None, encoder_mismatch: Mismatch = "refuse"
) -> SlideSelector:
    """The selector of a checkpoint directory or hub repository, as serving builds it."""
    config = SparseWSIConfig.from_pretrained(model, revision=revision)
    encoder = EncoderCheck(config.encoder, encoder_mismatch)
    scorer = load_scorer(model, revision)
    return SlideSelector(scorer, config.num_slide_tokens, device, config.max_patches, encoder=encoder)
