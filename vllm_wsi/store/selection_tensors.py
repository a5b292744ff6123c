"""A selection as tensors and JSON values, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vllm_wsi.selection.selection import Selection
from vllm_wsi.slides.encoder_names import EncoderMatch
from vllm_wsi.slides.places import PatchSize


def selection_tensors(chosen: Selection) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Without the scores and places of all patches, and without the seconds that it took."""
    tensors = {"indices": chosen.indices, "scores": chosen.scores, "features": chosen.features}
    if chosen.coords is not None:
        tensors["coords"] = torch.from_numpy(chosen.coords)
    facts = {
        "num_patches": chosen.num_patches,
        "num_nonfinite": chosen.num_nonfinite,
        "coord_unit": chosen.coord_unit,
        "unit_source": chosen.unit_source,
        "patch_size": chosen.patch_size,
        "metadata": dict(chosen.metadata),
        "encoder_match": chosen.encoder_match,
        "scored_on": chosen.scored_on,
    }
    return tensors, facts


def selection_of(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Selection:
    patch_size, encoder_match = facts.pop("patch_size"), facts.pop("encoder_match")
    return Selection(
        indices=tensors["indices"],
        scores=tensors["scores"],
        features=tensors["features"],
        coords=tensors["coords"].numpy() if "coords" in tensors else None,
        patch_size=None if patch_size is None else PatchSize(*patch_size),
        encoder_match=None if encoder_match is None else EncoderMatch(*encoder_match),
        **facts,
    )
