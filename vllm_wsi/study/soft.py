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
from vllm_wsi.training.batches import collate
from vllm_wsi.training.dataset import SlideDataset
from vllm_wsi.training.model import SparseLearnModel
from vllm_wsi.training.sparselearn import SparseLearn


class SoftResult(NamedTuple):
    """What the soft path answered; all of it [questions], in their order."""

    correct: NDArray[np.bool_]
    mass_on_hard: NDArray[np.float64]  # share of the K units of alpha that lie on the Hard Top-K
    effective_tokens: NDArray[np.float64]  # (sum alpha)^2 / sum alpha^2


@torch.no_grad()
def judge_soft(
    model: SparseWSIForConditionalGeneration,
    renderer: ChatRenderer,
    items: Sequence[SlideItem],
    gate: SparseLearn,
    max_patches: int = 4096,
    seed: int = 0,
) -> SoftResult:
    """Answers multiple-choice questions through a gate, with tau at its last value and K as it is served.

    Every patch reaches the decoder, so longer slides are thinned to `max_patches`, as in training.

    Args:
        gate: with its denoiser, where it has one; it is not changed.
        seed: of the gate's noise.
    """
    settings = gate.settings.changed(num_slide_tokens=model.config.num_slide_tokens, k_end=None)
    wrapped = SparseLearnModel(model, settings, gate)
    assert wrapped.sparselearn is not None
    wrapped.sparselearn.to(model.device).set_progress(1.0)
    dataset = SlideDataset(items, renderer, model.config, max_patches)
    pad = renderer.tokenizer.pad_token_id or 0
    correct, mass, tokens = [], [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, item in enumerate(items):  # one at a time: slides differ in length
            batch = collate([dataset[number]], model.config.slide_token_id, pad)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits, wanted = wrapped.tail_logits(**batch)
            first = int((wanted[0] != IGNORED).int().argmax())
            letters = "".join(item.options)
            best = logits[0, first, renderer.letter_ids(letters)].argmax()
            correct.append(letters[int(best)] == item.answer)
            alpha = wrapped.last_alpha
            assert alpha is not None
            # Alpha never falls as the score rises, so the Hard Top-K has the largest shares.
            hard = alpha.topk(min(settings.num_slide_tokens, alpha.shape[-1])).values
            mass.append(float(hard.sum() / alpha.sum()))
            tokens.append(float(alpha.sum() ** 2 / alpha.square().sum()))
    return SoftResult(np.array(correct), np.array(mass), np.array(tokens))
