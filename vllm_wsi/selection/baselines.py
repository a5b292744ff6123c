"""Selection rules without training, with which the learned scorer is compared: same interface, same K."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_wsi.errors import SlideError, needs_extra
from vllm_wsi.kernels import ScorerWeights, score_patches
from vllm_wsi.kernels.keys import pack_keys, unpack_keys
from vllm_wsi.slides import FeatureFile

from .chunk_reader import read_tensor_rows
from .evenly_spaced import evenly_spaced
from .patch_matrix import Patches, finite_patches, where
from .selection import Selection

BLOCK_ROWS = 4096
KMEANS_BATCH_ROWS = 4096
KMEANS_STARTS = 3


class Selector(Protocol):
    """What keeps patches of a slide: `SlideSelector` and every policy."""

    def select(self, slide: FeatureFile, k: int | None = None) -> Selection: ...


@dataclass(frozen=True)
class Policy(ABC):
    """A policy that keeps K patches of a slide.

    A patch with a NaN or an infinity is never kept. A slide with fewer than K finite patches keeps all of these. Ties
    go to the lower row. Distances are those of the features as the encoder gives them, not standardised. The same file,
    policy and machine give the same patches; on another machine, sums that round otherwise may turn a near tie, but not
    for "random", "uniform" and "oracle".

    Reads the slide once, into one fp32 matrix on the CPU: 4 bytes a feature; the kept rows are read again.

    Args:
        num_slide_tokens: K.
    """

    num_slide_tokens: int

    @torch.no_grad()
    def select(self, slide: FeatureFile, k: int | None = None) -> Selection:
        """Keeps k (default K) patches of an open feature file.

        Raises:
            SlideError: no patch has finite features, or the slide does not fit the policy.
        """
        k = self.num_slide_tokens if k is None else k
        if k < 1:
            raise ValueError(f"k: found {k}, wanted at least 1")
        began = time.perf_counter()
        patches, read_seconds = finite_patches(slide)
        if not len(patches.rows):
            raise SlideError(
                f"{where(slide)} no patch with finite features among {slide.num_patches}, wanted at least one; "
                "the features hold NaN or infinities"
            )
        places, scores = self._pick(patches, min(k, len(patches.rows)))
        order = torch.argsort(places)
        indices = patches.rows[places[order]]
        return Selection.of(
            slide,
            indices,
            scores[order],
            read_tensor_rows(slide, indices),
            num_nonfinite=slide.num_patches - len(patches.rows),
            read_seconds=read_seconds,
            score_seconds=time.perf_counter() - began - read_seconds,
        )

    @abstractmethod
    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        """(places in `patches` int64 [k], distinct, in any order; their scores fp32 [k]), 1 <= k <= m."""


@dataclass(frozen=True)
class RandomPolicy(Policy):
    """Patches drawn at random without replacement; what a smaller K keeps, a larger K keeps too. Scores are 0.

    The random numbers follow from the seed, N and the slide's `slide_id` (or the file's name where it has none).
    NumPy's PCG64 draws them; its stream is the same on every machine and with every version.
    """

    seed: int = 0

    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        slide = patches.slide
        name = slide.metadata.get("slide_id") or Path(slide.name).name
        digest = hashlib.blake2b(f"{self.seed}:{slide.num_patches}:{name}".encode(), digest_size=16).digest()
        lots = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(slide.num_patches)
        order = np.argsort(lots[patches.rows.numpy()], kind="stable")
        return torch.from_numpy(order[:k]), torch.zeros(k)


class UniformPolicy(Policy):
    """Evenly spaced rows: the i-th is floor((i + 0.5) * m / K) of the m finite ones. Scores are 0."""

    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        return evenly_spaced(k, len(patches.rows)), torch.zeros(k)


class TopNormPolicy(Policy):
    """The patches of the largest L2 norm, which is their score."""

    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        return unpack_keys(torch.topk(pack_keys(_norms(patches.features)), k).values)


@dataclass(frozen=True)
class KMeansPolicy(Policy):
    """The patch nearest to each of K centroids, in the centroids' order. A patch that is already taken is passed over
    for the next nearest.

    Centroids by scikit-learn's MiniBatchKMeans: approximate, but several times faster than its KMeans. It runs in one
    thread, so that the bits do not depend on the number of threads. Its batches are too small to gain from several
    threads, which on busy cores make it ten times slower. The score is minus the distance to the centroid. Needs the
    extra `study`.
    """

    seed: int = 0

    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        with needs_extra("study"):
            from sklearn.cluster import MiniBatchKMeans
            from threadpoolctl import threadpool_limits  # scikit-learn's own requirement
        x = patches.features
        if k == len(x):
            return torch.arange(k), torch.zeros(k)
        means = MiniBatchKMeans(k, batch_size=KMEANS_BATCH_ROWS, n_init=KMEANS_STARTS, random_state=self.seed)
        with threadpool_limits(1):
            centroids = torch.from_numpy(means.fit(x.numpy()).cluster_centers_)
        places, scores = _Places(k), torch.empty(k)
        for i, centroid in enumerate(centroids):
            scores[i] = places.take_best(-_distances(x, centroid))
        return places.taken, scores


class FarthestPointPolicy(Policy):
    """Greedy k-centre: first the patch nearest to the mean, then always the one farthest from all kept so far.

    The score is the distance to the nearest patch kept before; the first patch's, to the mean.
    """

    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        x = patches.features
        places, scores = _Places(k), torch.empty(k)
        scores[0] = -places.take_best(-_distances(x, x.mean(dim=0)))
        nearest = torch.full((len(x),), torch.inf)
        for i in range(1, k):
            torch.minimum(nearest, _distances(x, x[places.last]), out=nearest)
            scores[i] = places.take_best(nearest)
        return places.taken, scores


@dataclass(frozen=True)
class MMRPolicy(Policy):
    """Maximal marginal relevance: relevant patches that differ from one another (Carbonell and Goldstein, 1998).

    First the most relevant patch, then always the one with the largest
    `relevance_weight * relevance - (1 - relevance_weight) * similarity`. Relevance is the scorer's score, or the
    L2 norm where there is no scorer ("top-norm" made diverse, as the learned selection with one); it is scaled to
    0 .. 1 over the slide, so that it weighs against a cosine. Similarity is the largest cosine to a patch kept
    before, computed as 1 - |a - b|^2 / 2 of the L2-normalised features: exactly 1 for equal patches, blank ones
    too. The score is the relevance, not scaled.

    Args:
        scorer: the learned scorer's weights on the CPU, of the slide's d.
        relevance_weight: lambda, 0 .. 1; 1 keeps the K most relevant.
    """

    scorer: ScorerWeights | None = None
    relevance_weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.relevance_weight <= 1:
            raise ValueError(f"relevance_weight: found {self.relevance_weight}, wanted 0 to 1")

    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        x = patches.features
        norms = _norms(x)
        relevance = norms if self.scorer is None else _learned_scores(patches, self.scorer)
        low, high = relevance.aminmax()
        gain = (relevance - low) / (high - low if high > low else 1) * self.relevance_weight
        x /= torch.where(norms > 0, norms, 1)[:, None]
        places = _Places(k)
        places.take_best(relevance.clone())
        similarity = torch.full((len(x),), -torch.inf)
        for _ in range(1, k):
            cosine = 1 - _distances(x, x[places.last]).square_() / 2
            torch.maximum(similarity, cosine, out=similarity)
            places.take_best(gain - (1 - self.relevance_weight) * similarity)
        return places.taken, relevance[places.taken]


@dataclass(frozen=True)
class OraclePolicy(Policy):
    """The given rows of one slide alone (its key patches, say), the first K of them. Scores are 0.

    Args:
        rows: best first; repeated and non-finite ones are passed over.
    """

    rows: Sequence[int]

    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        slide = patches.slide
        place = {row: i for i, row in enumerate(patches.rows.tolist())}
        rows = [int(row) for row in dict.fromkeys(self.rows)]
        for row in rows:
            if not 0 <= row < slide.num_patches:
                raise SlideError(f"{where(slide)} {slide.num_patches} patches, wanted one in row {row} (oracle)")
        kept = [place[row] for row in rows if row in place][:k]
        if not kept:
            raise SlideError(f"{where(slide)} no finite patch among the {len(rows)} given rows, wanted one (oracle)")
        return torch.tensor(kept), torch.zeros(len(kept))


POLICIES: dict[str, type[Policy]] = {
    "random": RandomPolicy,
    "uniform": UniformPolicy,
    "top-norm": TopNormPolicy,
    "k-means": KMeansPolicy,
    "farthest-point": FarthestPointPolicy,
    "mmr": MMRPolicy,
    "oracle": OraclePolicy,
}


def make_policy(name: str, num_slide_tokens: int, seed: int = 0, **options: Any) -> Policy:
    """The policy of a name.

    Args:
        name: a key of `POLICIES`.
        num_slide_tokens: K.
        seed: for those that draw lots ("random", "k-means"); the others do without.
        options: the policy's own: "mmr" takes `scorer` and `relevance_weight`, "oracle" needs `rows`.
    """
    policy = POLICIES.get(name)
    if policy is None:
        raise ValueError(f"policy: found {name!r}, wanted one of {', '.join(POLICIES)}")
    if any(field.name == "seed" for field in fields(policy)):
        options["seed"] = seed
    return policy(num_slide_tokens, **options)


class _Places:
    """Patches as a greedy policy takes them, one at a time and none twice."""

    def __init__(self, k: int) -> None:
        self._places: list[int] = []
        self.taken = torch.empty(k, dtype=torch.int64)

    @property
    def last(self) -> int:
        return self._places[-1]

    def take_best(self, values: Tensor) -> Tensor:
        """Takes the place of the largest value, the lowest place among equals, and returns the value. Overwrites
        `values`."""
        values[self._places] = -torch.inf
        place = int(values.argmax())
        self.taken[len(self._places)] = place
        self._places.append(place)
        return values[place]


def _learned_scores(patches: Patches, scorer: ScorerWeights) -> Tensor:
    slide = patches.slide
    if slide.feature_dim != scorer.feature_dim:
        raise SlideError(f"{where(slide)} d = {slide.feature_dim}, wanted {scorer.feature_dim}, as the scorer has it")
    scores = score_patches(patches.features, scorer)
    if not torch.isfinite(scores).all():
        raise SlideError(f"{where(slide)} a score that is NaN or infinite, wanted finite ones for finite features")
    return scores


def _norms(features: Tensor) -> Tensor:
    """L2 norms fp32 [m], summed in double precision; what exceeds fp32 becomes its largest number."""
    blocks = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) for x in features.split(BLOCK_ROWS)]
    return torch.cat(blocks).clamp_(max=torch.finfo(torch.float32).max).float()


def _distances(features: Tensor, point: Tensor) -> Tensor:
    """L2 distances fp32 [m] of each row to one point: row by row from the differences, so that equal rows tie."""
    return torch.cdist(features, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
