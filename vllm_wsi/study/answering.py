"""Answers of a transformers model to multiple-choice questions, in batches: the option with the highest probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.prompt_layout import pad_left
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.selection import Selection

BATCH = 32
"""Questions that the model answers at once."""


class Choice(NamedTuple):
    """One answer."""

    option: str  # a key of the question's options
    logprobs: dict[str, float]  # over the options alone


@torch.no_grad()
def choose(
    model: SparseWSIForConditionalGeneration,
    renderer: ChatRenderer,
    items: Sequence[SlideItem],
    selections: Sequence[Sequence[Selection]],
) -> list[Choice]:
    """The option whose first token the model finds most likely at the first place of its answer.

    Args:
        items: multiple-choice questions; the options of one begin with different tokens.
        selections: for each item, one for each of its slides.

    Raises:
        ValueError: two options of a question begin with the same token.
    """
    choices: list[Choice] = []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        prompts = [
            model.prepare(torch.tensor(renderer.question(item), device=model.device), chosen)
            for item, chosen in zip(part, selections[start : start + BATCH], strict=True)
        ]
        logits = model.language_model(
            inputs_embeds=pad_left([embeddings[0] for embeddings, _ in prompts]),
            position_ids=pad_left([positions[0] for _, positions in prompts]),
            attention_mask=pad_left([torch.ones_like(positions[0]) for _, positions in prompts]),
            logits_to_keep=1,
            use_cache=False,
        ).logits[:, -1]
        for row, item in enumerate(part):
            options = list(item.options)
            found = logits[row, renderer.first_ids(options)].float().log_softmax(dim=0)
            choices.append(Choice(options[int(found.argmax())], dict(zip(options, found.tolist(), strict=True))))
    return choices
