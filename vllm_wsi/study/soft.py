"""Answers through the soft path at the end of its schedule, to compare them with those of the served Hard Top-K."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_wsi.model.chat_renderer import IGNORED, ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.selection import Selection
from vllm_wsi.training.batches import collate
from vllm_wsi.training.dataset import SlideDataset
from vllm_wsi.training.model import SparseLearnModel
from vllm_wsi.training.sparselearn import SparseLearn


class SoftResult(NamedTuple):
    """What the soft path answered; all of it [questions], in their order."""

    correct: NDArray[np.bool_]
    mass_on_hard: NDArray[np.float64]  # share of alpha's mass on the patches that Hard Top-K serves
    effective_tokens: NDArray[np.float64]  # (sum alpha)^2 / sum alpha^2


@torch.no_grad()
def judge_soft(
    model: SparseWSIForConditionalGeneration,
    renderer: ChatRenderer,
    items: Sequence[SlideItem],
    gate: SparseLearn,
    selections: Sequence[Sequence[Selection]],
    max_patches: int = 4096,
    seed: int = 0,
) -> SoftResult:
    """Answers multiple-choice questions through a gate, with tau at its last value and K as it is served.

    Every patch reaches the decoder, so longer slides are thinned to `max_patches`, as in training.

    Args:
        gate: with its denoiser, where it has one; it is not changed.
        selections: of the served Hard Top-K, for each question one for each of its slides. Where the gate draws its own
            patches, as Gumbel does, their share of alpha is below 1 though alpha is 0 or 1 everywhere.
        seed: of the gate's noise.
    """
    wrapped = SparseLearnModel(model, None)
    wrapped.sparselearn = served_gate(model, gate)
    dataset = SlideDataset(items, renderer, model.config, max_patches)
    pad = renderer.tokenizer.pad_token_id or 0
    correct, mass, tokens = [], [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, item in enumerate(items):  # one at a time: slides differ in length
            question = dataset[number]
            batch = collate([question], model.config.slide_token_id, pad)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits, wanted = wrapped.tail_logits(**batch)
            first = int((wanted[0] != IGNORED).int().argmax())
            options = list(item.options)
            best = logits[0, first, renderer.first_ids(options)].argmax()
            correct.append(options[int(best)] == item.answer)
            alpha = wrapped.last_alpha
            assert alpha is not None
            served = [
                float(row[: len(slide.indices)].cpu()[torch.isin(slide.indices, selection.indices)].sum())
                for row, slide, selection in zip(alpha, question.slides, selections[number], strict=True)
            ]
            mass.append(min(1.0, sum(served) / float(alpha.sum())))  # the sums differ by rounding
            tokens.append(float(alpha.sum() ** 2 / alpha.square().sum()))
    return SoftResult(np.array(correct), np.array(mass), np.array(tokens))


def served_gate(model: SparseWSIForConditionalGeneration, gate: SparseLearn) -> SparseLearn:
    """A copy of a gate, denoiser and all, with tau at its last value and K as the model serves it."""
    settings = gate.settings.changed(num_slide_tokens=model.config.num_slide_tokens, k_end=None)
    served = SparseLearn(model.config.feature_dim, settings, gate).to(model.device)
    served.set_progress(1.0)
    return served
