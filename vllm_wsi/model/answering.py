"""Answers of a transformers model to multiple-choice questions, in batches: the letter with the highest probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.selector import Selection

from .chat_renderer import ChatRenderer
from .modeling import SparseWSIForConditionalGeneration

BATCH = 32


class Choice(NamedTuple):
    """One answer."""

    letter: str
    logprobs: dict[str, float]  # over the option letters alone


@torch.no_grad()
def choose(
    model: SparseWSIForConditionalGeneration,
    renderer: ChatRenderer,
    items: Sequence[SlideItem],
    selections: Sequence[Sequence[Selection]],
) -> list[Choice]:
    """The option letter that the model finds most likely at the first place of its answer.

    Args:
        items: of multiple choice.
        selections: for each item, one for each of its slides, as the decoder shall see them.
    """
    choices: list[Choice] = []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        prompts = [
            model.prepare(torch.tensor(renderer.question(item), device=model.device), chosen)
            for item, chosen in zip(part, selections[start : start + BATCH], strict=True)
        ]
        embeddings, positions, mask = pad_left(prompts)
        logits = model.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, logits_to_keep=1, use_cache=False
        ).logits[:, -1]
        for row, item in enumerate(part):
            letters = "".join(item.options)
            found = logits[row, renderer.letter_ids(letters)].float().log_softmax(dim=0)
            choices.append(Choice(letters[int(found.argmax())], dict(zip(letters, found.tolist(), strict=True))))
    return choices


def pad_left(prompts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(embeddings [B, T, hidden], positions [B, T], attention mask [B, T]) of prompts as `prepare` gives them."""
    length = max(positions.shape[1] for _, positions in prompts)
    first = prompts[0][0]
    embeddings = first.new_zeros((len(prompts), length, first.shape[2]))
    positions = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=first.device)
    mask = torch.zeros_like(positions)
    for row, (one, places) in enumerate(prompts):
        embeddings[row, length - one.shape[1] :] = one[0]
        positions[row, length - one.shape[1] :] = places[0]
        mask[row, length - one.shape[1] :] = 1
    return embeddings, positions, mask
