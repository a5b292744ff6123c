"""What the studies of summary tokens show the decoder of a slide: K tokens, chosen and pooled in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_wsi.kernels import ScorerWeights
from vllm_wsi.selection.evenly_spaced import evenly_spaced
from vllm_wsi.selection.slide_pools import normalised

from .pooled_means import SAMPLE, Pools, labels_of, pooled, sample_centres

K = 32
BY_PLACE = ("mean of all", "means of stretches", "means of interleaved rows", "nearest to means of interleaved rows")
COUNT_SCALE, SHARE_SCALE = 4.0, 4.0


class Arm(NamedTuple):
    """K - S best patches, and S tokens that stand for the dropped ones."""

    rest: str  # what the S are
    s: int = 0
    told: bool = False  # whether each token says how many patches it stands for

    @property
    def clusters(self) -> str:
        """The kind of k-means that it needs."""
        return self.rest.removesuffix(" by size").removeprefix("nearest to ")

    @property
    def name(self) -> str:
        return f"{self.rest}{', told' if self.told else ''}"


ARMS = (
    Arm("none"),  # K best patches alone
    Arm("random", K), Arm("random", 16), Arm("evenly spaced", 8), Arm("evenly spaced", 16),
    Arm("k-means", 4), Arm("k-means", 8), Arm("k-means", 16),
    Arm("k-means", 4, True), Arm("k-means", 8, True), Arm("k-means", 16, True),
    Arm("k-means by size", 8), Arm("k-means of phi", 8, True),
    Arm("k-means of equal size", 8), Arm("k-means of equal size", 16),
    Arm("mean of all", 1), Arm("means of stretches", 8),
    Arm("nearest to k-means of equal size", 8), Arm("nearest to k-means of equal size", 16),
    Arm("means of stretches", 4), Arm("means of stretches", 16), Arm("means of interleaved rows", 8),
    Arm("means of interleaved rows", 4), Arm("means of interleaved rows", 16),
    Arm("nearest to means of interleaved rows", 8),
)  # fmt: skip


class Shown(NamedTuple):
    """Tokens [K, d] of one slide, normalised, and how many patches each stands for, [K]."""

    tokens: Tensor
    counts: Tensor


@torch.no_grad()
def shown(features: Tensor, scores: Tensor, arms: Sequence[Arm], seed: int, phi: Tensor | None = None) -> list[Shown]:
    """What each arm shows of a slide.

    The best patches come first, in their order on the slide, then the S others: patches in their order, stretches in
    their order, pools in the order of their centres, or the largest first.

    Args:
        features: fp32 [N, d].
        scores: fp32 [N].
        seed: of the random patches.
        phi: fp32 [N, h], for arms whose clusters lie in that space.
    """
    x = normalised(features)
    order = scores.argsort(descending=True, stable=True)
    found, labels = [], _labels(x, phi, arms)
    for arm in arms:
        kept = order[: K - arm.s].sort().values
        dropped = torch.ones(len(x), dtype=torch.bool)
        dropped[kept] = False
        rows = dropped.nonzero()[:, 0]
        if arm.rest in ("none", "evenly spaced", "random"):
            if arm.rest == "random":
                generator = torch.Generator().manual_seed(seed)
                places = torch.randperm(len(rows), generator=generator)[: arm.s].sort().values
            else:
                places = evenly_spaced(arm.s, len(rows)) if arm.s else rows[:0]
            more, counts = x[rows[places]], torch.ones(arm.s)
        elif arm.rest in BY_PLACE:
            place = torch.arange(len(rows))
            of = place % arm.s if arm.rest.endswith("interleaved rows") else place * arm.s // len(rows)
            pools = pooled(x[rows], of, arm.s)
            more, counts = normalised(pools.means()), pools.counts.float()
            if arm.rest.startswith("nearest to "):
                more = nearest_members(more, x[rows], of)
        else:
            whole, of = labels[arm.clusters, arm.s]
            pools = whole.without(x[kept], of[kept])
            more, counts = normalised(pools.means()), pools.counts.float()
            if arm.rest.endswith(" by size"):
                largest = counts.argsort(descending=True, stable=True)
                more, counts = more[largest], counts[largest]
            elif arm.rest.startswith("nearest to "):
                more = nearest_members(more, x[rows], of[rows])
        found.append(Shown(torch.cat((x[kept], more)), torch.cat((torch.ones(len(kept)), counts))))
    return found


def nearest_members(means: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """[S, d]: of each pool the row that is nearest to its mean.

    Args:
        means: [S, d].
        rows: [n, d].
        labels: int64 [n], the pool of each row.
    """
    distances = torch.cdist(means, rows)
    return rows[distances.masked_fill(labels[None] != torch.arange(len(means))[:, None], torch.inf).argmin(dim=1)]


def _labels(x: Tensor, phi: Tensor | None, arms: Sequence[Arm]) -> dict[tuple[str, int], tuple[Pools, Tensor]]:
    """(Kind of k-means, S) -> the pools of all patches, and each patch's pool."""
    found = {}
    sample = evenly_spaced(SAMPLE, len(x))
    for rest, s in {(arm.clusters, arm.s) for arm in arms if "k-means" in arm.rest}:
        space = x
        if rest == "k-means of phi":
            assert phi is not None
            space = phi
        labels = labels_of(space, sample_centres(space[sample], s, rest.endswith("equal size")))
        found[rest, s] = pooled(x, labels, s), labels
    return found


def hidden_vectors(features: Tensor, scorer: ScorerWeights) -> Tensor:
    """phi [n, h]: what the scorer makes of each patch before its last layer."""
    assert scorer.hidden_weight is not None
    gain, shift = scorer.norm_weight, scorer.norm_bias
    x = F.layer_norm(features.float(), features.shape[-1:], gain, shift, scorer.norm_eps)
    return F.gelu(F.linear(x, scorer.hidden_weight, scorer.hidden_bias))


def with_counts(tokens: Tensor, counts: Tensor, told: bool) -> Tensor:
    """Tokens [..., d + 2]: behind the features ln(1 + count) / 4, and four times the share of all counts; else zeros.

    Args:
        counts: [...], of the patches that each token stands for.
    """
    say = torch.stack((counts.log1p() / COUNT_SCALE, SHARE_SCALE * counts / counts.sum(dim=-1, keepdim=True)), dim=-1)
    return torch.cat((tokens, say if told else torch.zeros_like(say)), dim=-1)
