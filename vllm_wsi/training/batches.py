"""From items to batches: padded features, laid-out prompts, positions, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_wsi.model.chat_renderer import IGNORED
from vllm_wsi.model.prompt_layout import PatchRows, lay_out, pad_left

from .dataset import TrainingItem


def collate(items: Sequence[TrainingItem], slide_token_id: int, pad_token_id: int) -> dict[str, Tensor]:
    """One batch for `SparseLearnModel`; S slides in all, T tokens in the longest prompt, padded on the left.

    Returns:
        features fp32 [S, n, d] and patch_mask bool [S, n], padded on the right; input_ids, attention_mask,
        position_ids and labels int64 [B, T], with one slide token for each patch.
    """
    slides = [slide for item in items for slide in item.slides]
    most = max(len(slide.features) for slide in slides)
    features = torch.zeros(len(slides), most, slides[0].features.shape[1])
    patch_mask = torch.zeros(len(slides), most, dtype=torch.bool)
    for place, slide in enumerate(slides):
        features[place, : len(slide.features)] = slide.features
        patch_mask[place, : len(slide.features)] = True
    prompts = [_prompt(item, slide_token_id) for item in items]
    return {
        "features": features,
        "patch_mask": patch_mask,
        "input_ids": pad_left([prompt.ids for prompt in prompts], pad_token_id),
        "position_ids": pad_left([prompt.positions for prompt in prompts]),
        "labels": pad_left([prompt.labels for prompt in prompts], IGNORED),
        "attention_mask": pad_left([torch.ones_like(prompt.ids) for prompt in prompts]),
    }


class _Prompt(NamedTuple):
    """One prompt whose slide tokens stand once for each patch; int64 [T] each."""

    ids: Tensor
    positions: Tensor
    labels: Tensor


def _prompt(item: TrainingItem, slide_token_id: int) -> _Prompt:
    ids, labels = torch.tensor(item.ids), torch.tensor(item.labels)
    slides = [PatchRows(slide.indices, slide.num_patches) for slide in item.slides]
    repeats, positions = lay_out(ids, slides, slide_token_id, item.budget)
    return _Prompt(ids.repeat_interleave(repeats), positions, labels.repeat_interleave(repeats))
