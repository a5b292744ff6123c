"""From items to batches: padded features, laid-out prompts, positions, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_wsi.model.chat_renderer import IGNORED, EncodedChat
from vllm_wsi.model.prompt_layout import PatchRows, lay_out, pad_left, repeated
from vllm_wsi.model.question_text import NO_TOKEN

from .dataset import TrainingItem


def collate(items: Sequence[TrainingItem], slide_token_id: int, pad_token_id: int) -> dict[str, Tensor]:
    """One batch for `SparseLearnModel`; S slides in all, T tokens in the longest sequence.

    Returns:
        features fp32 [S, n, d] and patch_mask bool [S, n], padded on the right; num_candidates int64 [S], of
        `TrainingSlide`; input_ids, attention_mask, position_ids and labels int64 [B, T], with one slide token for each
        patch, padded on the left. Where an item has siblings, sequences are laid out as `shared_prefix` says, and
        branches int64 [B, Tb] numbers the conversations of the last Tb tokens from 1; 0 is padding. Where the scorer
        hears questions, question_ids int64 [S, t] are those of each slide, `NO_TOKEN` at padding.

    Raises:
        ValueError: an item's siblings differ from it before their last slide token.
    """
    slides = [slide for item in items for slide in item.slides]
    most = max(len(slide.features) for slide in slides)
    features = torch.zeros(len(slides), most, slides[0].features.shape[1])
    patch_mask = torch.zeros(len(slides), most, dtype=torch.bool)
    for place, slide in enumerate(slides):
        features[place, : len(slide.features)] = slide.features
        patch_mask[place, : len(slide.features)] = True
    if any(item.siblings for item in items):
        tokens = _padded_branches([_branched(item, slide_token_id) for item in items], pad_token_id)
    else:
        chats = [EncodedChat(item.ids, item.labels) for item in items]
        tokens = _padded(
            [_prompt(item, chat, slide_token_id) for item, chat in zip(items, chats, strict=True)], pad_token_id
        )
    num_candidates = torch.tensor([slide.num_candidates for slide in slides])
    if items[0].question is not None:
        questions = [torch.tensor(item.question, dtype=torch.int64) for item in items for _ in item.slides]
        tokens["question_ids"] = pad_left(questions, NO_TOKEN)
    return {"features": features, "num_candidates": num_candidates, "patch_mask": patch_mask} | tokens


class _Prompt(NamedTuple):
    """One prompt whose slide tokens stand once for each patch; int64 [T] each."""

    ids: Tensor
    positions: Tensor
    labels: Tensor


class _Branched(NamedTuple):
    """Several prompts that begin alike."""

    prefix: _Prompt
    branches: list[_Prompt]


def _prompt(item: TrainingItem, chat: EncodedChat, slide_token_id: int) -> _Prompt:
    ids, labels = torch.tensor(chat.ids), torch.tensor(chat.labels)
    slides = [PatchRows(slide.indices, slide.num_patches, slide.num_summary) for slide in item.slides]
    repeats, positions = lay_out(ids, slides, slide_token_id, item.budget)
    return _Prompt(repeated(ids, repeats), positions, repeated(labels, repeats))


def _branched(item: TrainingItem, slide_token_id: int) -> _Branched:
    chats = [EncodedChat(item.ids, item.labels), *item.siblings]
    shared = _shared_length(chats)
    if slide_token_id in item.ids[shared:] and item.siblings:
        raise ValueError("siblings: found ids that differ before the last slide token, wanted the same ones")
    prompts = [_prompt(item, chat, slide_token_id) for chat in chats]
    length = len(prompts[0].ids) - len(item.ids) + shared  # slides are shorter by that much before they are laid out
    prefix = _Prompt(*(row[:length] for row in prompts[0]))
    return _Branched(prefix, [_Prompt(*(row[length:] for row in prompt)) for prompt in prompts])


def _shared_length(chats: Sequence[EncodedChat]) -> int:
    """How many ids stand once for all conversations. Each labelled token, and the token before it that predicts it,
    stays in its own branch: the loss counts it once for each conversation."""
    shortest = min(len(chat.ids) for chat in chats)
    alike = next((n for n in range(shortest) if len({chat.ids[n] for chat in chats}) > 1), shortest)
    first = [next((n for n, label in enumerate(chat.labels) if label != IGNORED), len(chat.ids)) for chat in chats]
    return max(0, min(alike, *(n - 1 for n in first)))


def _padded(prompts: Sequence[_Prompt], pad_token_id: int) -> dict[str, Tensor]:
    return {
        "input_ids": pad_left([prompt.ids for prompt in prompts], pad_token_id),
        "position_ids": pad_left([prompt.positions for prompt in prompts]),
        "labels": pad_left([prompt.labels for prompt in prompts], IGNORED),
        "attention_mask": pad_left([torch.ones_like(prompt.ids) for prompt in prompts]),
    }


def _padded_branches(sequences: Sequence[_Branched], pad_token_id: int) -> dict[str, Tensor]:
    prefixes = [sequence.prefix for sequence in sequences]
    ends = [_Prompt(*(torch.cat(rows) for rows in zip(*one.branches, strict=True))) for one in sequences]
    numbers = [
        torch.cat([torch.full_like(branch.ids, number) for number, branch in enumerate(one.branches, start=1)])
        for one in sequences
    ]
    # Padding in the middle: on the right of the prefix, on the left of the branches.
    flipped = _padded([_Prompt(*(row.flip(0) for row in prefix)) for prefix in prefixes], pad_token_id)
    behind = _padded(ends, pad_token_id)
    tokens = {name: torch.cat([flipped[name].flip(1), behind[name]], dim=1) for name in behind}
    return tokens | {"branches": pad_left(numbers)}
