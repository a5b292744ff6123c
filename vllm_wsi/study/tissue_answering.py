"""Written answers of a transformers model in batches, and how likely it found each answer that it was taught."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_wsi.benchmark.parsing import parse_label
from vllm_wsi.errors import CheckpointError
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.prompt_layout import pad_left
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.selection import Selection
from vllm_wsi.tissue.tissue_questions import TissueQuestion

from .tissue_measures import brier

BATCH_TOKENS = 4096
"""Tokens of the prompts, padding included, that the model reads at once."""


class Written(NamedTuple):
    """One answer."""

    text: str  # greedily written
    probabilities: dict[str, float]  # label -> of its answer's first token, over those of all labels


class Asked(NamedTuple):
    """One question with what was selected of its slide."""

    item: SlideItem
    question: TissueQuestion
    selection: Selection | None  # None: no slide is shown


@torch.no_grad()
def write_answers(
    model: SparseWSIForConditionalGeneration, renderer: ChatRenderer, asked: Sequence[Asked], max_new_tokens: int
) -> list[Written]:
    """The answers, in the order of the questions.

    Raises:
        CheckpointError: the answers of two labels begin with the same token.
    """
    prompts = [_prompt(model, renderer, one) for one in asked]
    answers: dict[int, Written] = {}
    for batch in _batches([len(positions) for _, positions in prompts]):
        embeddings, positions = (pad_left([prompts[i][part] for i in batch]) for part in (0, 1))
        mask = pad_left([torch.ones_like(prompts[i][1]) for i in batch])
        first, texts = _greedy(model, renderer, embeddings, positions, mask, max_new_tokens)
        for row, i in enumerate(batch):
            starts = first_tokens(renderer, asked[i].question)
            found = first[row, list(starts.values())].softmax(dim=0).tolist()
            answers[i] = Written(texts[row], dict(zip(starts, found, strict=True)))
    return [answers[i] for i in range(len(asked))]


def scored(question: TissueQuestion, answer: Written) -> dict[str, Any]:
    """The columns of an answer: the likeliest answer and the written one, each right or wrong.

    What was written is read by the rules of `benchmark.parsing`, as in every benchmark here.
    """
    said, gold = answer.probabilities, question.gold
    label = max(said, key=lambda option: said[option])
    parsed = parse_label(answer.text, question.options)
    return {
        "kind": question.kind,
        "gold": question.options[gold],
        "likeliest": question.options[label],
        "correct": int(label == gold),
        "confidence": round(said[label], 6),
        "brier": round(brier(said, gold), 6),
        "written_correct": int(parsed.label == gold),
        "parsed": int(parsed.label is not None),
        "text": json.dumps(answer.text, ensure_ascii=False)[1:-1],  # an untrained decoder writes any byte
    }


def first_tokens(renderer: ChatRenderer, question: TissueQuestion) -> dict[str, int]:
    """label -> the token that its answer begins with.

    Raises:
        CheckpointError: two labels' answers begin with the same token.
    """
    encode = renderer.tokenizer.encode
    found = {label: encode(text, add_special_tokens=False)[0] for label, text in question.answers.items()}
    if len({*found.values()}) < len(found):
        raise CheckpointError(
            f"tokenizer: found answers to a question of {question.kind} that begin with the same token, "
            "wanted different ones"
        )
    return found


def _prompt(model: SparseWSIForConditionalGeneration, renderer: ChatRenderer, asked: Asked) -> tuple[Tensor, Tensor]:
    """(embeddings [T, hidden], positions [T])."""
    item, selections = asked.item, [asked.selection]
    if asked.selection is None:
        item, selections = SlideItem(item.where, (), ((asked.question.text, item.answer),)), []
    ids = torch.tensor(renderer.question(item), device=model.device)
    embeddings, positions = model.prepare(ids, [one for one in selections if one is not None])
    return embeddings[0], positions[0]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Prompts of like lengths, as many together as `BATCH_TOKENS` allows, and at least one.

    None is padded to twice its length or more: on a CPU, padding costs what tokens cost.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest = lengths[order[0]]
        like = sum(2 * lengths[i] > longest for i in order)
        size = min(like, max(1, BATCH_TOKENS // longest))
        yield order[:size]
        order = order[size:]


def _greedy(
    model: SparseWSIForConditionalGeneration,
    renderer: ChatRenderer,
    embeddings: Tensor,
    positions: Tensor,
    mask: Tensor,
    max_new_tokens: int,
) -> tuple[Tensor, list[str]]:
    """(fp32 logits [B, vocabulary] of the first token, the texts written)."""
    ends = torch.tensor(renderer.end_of_turn(), device=embeddings.device)
    out = model.language_model(
        inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, logits_to_keep=1, use_cache=True
    )
    first = out.logits[:, -1].float()
    token, position = first.argmax(dim=-1), positions[:, -1]
    tokens, done = [token], torch.isin(token, ends)
    while len(tokens) < max_new_tokens and not done.all():
        position = position + 1
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        out = model.language_model(
            input_ids=token[:, None],
            position_ids=position[:, None],
            attention_mask=mask,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        token = torch.where(done, ends[0], out.logits[:, -1].argmax(dim=-1))
        tokens.append(token)
        done |= torch.isin(token, ends)
    texts = renderer.tokenizer.batch_decode(torch.stack(tokens, dim=1), skip_special_tokens=True)
    return first, [text.strip() for text in texts]
