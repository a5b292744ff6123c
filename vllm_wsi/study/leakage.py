"""Leakage by perturbation: what a kept patch shows of a dropped one, once gate and denoiser are through with both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.selection.selection import Selection
from vllm_wsi.training.dataset import SlideDataset, TrainingSlide
from vllm_wsi.training.sparselearn import SparseLearn

from .table_numbers import significant

NUM_PERTURBED = 8
"""Dropped patches of a slide that are changed, one at a time: the one with the highest score, others at random."""


class Leakage(NamedTuple):
    """Relative changes |y' - y| / |y| of the kept patches' vectors behind gate and denoiser.

    Both are fp64 [slides, perturbed patches, kept patches], flat: no slide has more of one than of another but for its
    length.
    """

    alpha_held: NDArray[np.float64]  # the change may pass through the denoiser alone
    rescored: NDArray[np.float64]  # through the scorer, the scores' mean and variance, and the threshold of K, too
    num_slides: int  # those with a dropped patch

    def columns(self) -> dict[str, Any]:
        """Mean and most of both, as a table shows them; "" where no slide has a dropped patch."""
        found: dict[str, Any] = {"leakage_slides": self.num_slides}
        for name, changes in (("leakage", self.alpha_held), ("leakage_rescored", self.rescored)):
            for kind, value in (("mean", np.mean), ("max", np.max)):
                found[f"{name}_{kind}"] = significant(float(value(changes))) if len(changes) else ""
        return found


@torch.no_grad()
def measure_leakage(
    model: SparseWSIForConditionalGeneration,
    gate: SparseLearn,
    dataset: SlideDataset,
    selections: Sequence[Sequence[Selection]],
    seed: int = 0,
) -> Leakage:
    """Changes one dropped patch at a time and looks at the kept ones; the gate's noise is the same before and after.

    The dropped patch takes the features of another patch of its slide. Kept are those of the served Hard Top-K. A
    denoiser that sees each patch alone moves no kept patch while alpha is held. What moves them where the scores are
    new is the standardisation of scores over the slide, and the threshold of the Soft Top-K.

    Args:
        model: scorer and projector, as they are served.
        gate: tau at its last value, and K as it is served (`soft.served_gate`).
        dataset: of the questions.
        selections: for each question, one for each of its slides.
        seed: of the patches that are changed and of the gate's noise.
    """
    rng = np.random.default_rng(seed)
    held, rescored, num_slides = [], [], 0
    with torch.random.fork_rng(devices=[]):
        for number, chosen in enumerate(selections):
            for slide, selection in zip(dataset[number].slides, chosen, strict=True):
                kept = torch.isin(slide.indices, selection.indices)
                if kept.all() or not kept.any():
                    continue
                num_slides += 1
                for before, with_alpha, with_scores in _perturbed(model, gate, slide, kept, rng):
                    held.append(_relative(before, with_alpha))
                    rescored.append(_relative(before, with_scores))
    nothing = np.zeros(0)
    return Leakage(np.concatenate([nothing, *held]), np.concatenate([nothing, *rescored]), num_slides)


def _perturbed(
    model: SparseWSIForConditionalGeneration,
    gate: SparseLearn,
    slide: TrainingSlide,
    kept: Tensor,
    rng: np.random.Generator,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Vectors [kept, d] of the kept patches for each perturbation: before, after with alpha held, after."""
    features = slide.features.float()[None].to(model.device)
    mask = torch.ones(features.shape[:2], dtype=torch.bool, device=model.device)
    noise_seed = int(rng.integers(2**31))

    def gated(features: Tensor, scores: Tensor) -> Tensor:
        torch.manual_seed(noise_seed)
        return gate(model.projector.normalise(features), scores, mask).features[0, kept].double().cpu()

    scores = model.scorer(features, mask)
    before = gated(features, scores)
    dropped = torch.nonzero(~kept)[:, 0].numpy()
    best = dropped[int(scores[0].cpu()[~kept].argmax())]
    others = rng.permutation(dropped[dropped != best])[: NUM_PERTURBED - 1]
    found = []
    for row in [int(best), *others.tolist()]:
        donor = int(rng.choice(np.delete(np.arange(len(kept)), row)))
        changed = features.clone()
        changed[0, row] = features[0, donor]
        found.append((before, gated(changed, scores), gated(changed, model.scorer(changed, mask))))
    return found


def _relative(before: Tensor, after: Tensor) -> NDArray[np.float64]:
    change = torch.linalg.vector_norm(after - before, dim=1)
    return torch.where(change == 0, 0.0, change / torch.linalg.vector_norm(before, dim=1)).numpy()
