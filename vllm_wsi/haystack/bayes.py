"""The Bayes limit of haystack: patches ranked by the densities that a world draws them from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_wsi.errors import SlideError
from vllm_wsi.kernels.keys import pack_keys, unpack_keys
from vllm_wsi.selection.baselines import Policy
from vllm_wsi.selection.patch_matrix import Patches, where

from .generator import DENSE_NOISE, FINDINGS, LOUDNESS, HaystackWorld


@dataclass(frozen=True)
class BayesPolicy(Policy):
    """The patches of the largest log density ratio of evidence against background, which is their score.

    Exact from the world's own parameters. By the lemma of Neyman and Pearson, no score of single patches keeps more of
    the evidence on average, if every finding is as likely and the patches of a slide are taken as independent draws; a
    rule that sees a slide's patches together might. It knows what no scorer can: it is a limit, not a method.

    Args:
        world: that the slides are of, with all its knobs.
    """

    world: HaystackWorld = field(default_factory=HaystackWorld)

    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        if patches.slide.feature_dim != self.world.feature_dim:
            found = f"{where(patches.slide)} d = {patches.slide.feature_dim}"
            raise SlideError(f"{found}, wanted {self.world.feature_dim}, as the world has it (bayes)")
        ratio = evidence_log_ratio(patches.features.numpy(), self.world)
        return unpack_keys(torch.topk(pack_keys(torch.from_numpy(ratio).float()), k).values)


def evidence_log_ratio(features: NDArray, world: HaystackWorld) -> NDArray[np.float64]:
    """[N] of features [N, d]: log p(x | patch of a finding) - log p(x | any other patch), in nats."""
    log_density = _log_densities(features.astype(np.float64), *_type_normals(world))
    is_finding = np.zeros(log_density.shape[1], bool)
    is_finding[world.num_common : world.num_common + len(FINDINGS)] = True
    with np.errstate(divide="ignore"):  # a type that the world never draws has weight 0
        log_weights = np.log(_background_weights(world))
    evidence = np.logaddexp.reduce(log_density[:, is_finding] - np.log(len(FINDINGS)), axis=1)
    return evidence - np.logaddexp.reduce(log_density[:, ~is_finding] + log_weights, axis=1)


def _type_normals(world: HaystackWorld) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean [types, d], standard deviation [types] of every feature), as `HaystackSlide.features` draws them."""
    means = world.centres.astype(np.float64)
    deviations = np.full(len(means), float(world.noise))
    for kind in range(world.num_common + len(FINDINGS), world.first_lookalike):
        if kind % 2:
            means[kind] *= LOUDNESS
            deviations[kind] *= LOUDNESS
        else:
            deviations[kind] = DENSE_NOISE
    return means, deviations


def _background_weights(world: HaystackWorld) -> NDArray[np.float64]:
    """[types without the findings], sums to 1: how often a patch that belongs to no finding is of each type."""
    lookalikes, distractors = world.lookalike_rate, world.distractor_rate
    shares = ((1 - lookalikes) * (1 - distractors), (1 - lookalikes) * distractors, lookalikes)
    counts = (world.num_common, world.num_distractors, len(FINDINGS))
    return np.concatenate([np.full(n, share / n) for n, share in zip(counts, shares, strict=True) if n])


def _log_densities(
    x: NDArray[np.float64], means: NDArray[np.float64], deviations: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[N, types]: of x [N, d] under normals whose features are independent and of one deviation."""
    squares = (x * x).sum(axis=1, keepdims=True) - 2 * x @ means.T + (means * means).sum(axis=1)
    return -0.5 * squares / deviations**2 - x.shape[1] * np.log(deviations * np.sqrt(2 * np.pi))
