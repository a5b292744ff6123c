"""A selection as tensors and JSON values, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_wsi.selection.score_summary import LEVELS, ScoreSummary
from vllm_wsi.selection.selection import Selection
from vllm_wsi.selection.slide_pools import SlidePools, SlideScores
from vllm_wsi.slides.encoder_names import EncoderMatch
from vllm_wsi.slides.feature_file import Unit
from vllm_wsi.slides.places import PatchSize

SCORES = ((1, torch.float32), (2, torch.float32), (2, torch.float16))
"""Dimensions and dtype: scores [N], and vectors [N, R] of a `QuestionScorer`."""


def selection_tensors(chosen: Selection) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Without the scores and places of all patches, and without the seconds that it took."""
    tensors = {"indices": chosen.indices, "scores": chosen.scores, "features": chosen.features}
    if chosen.coords is not None:
        tensors["coords"] = torch.from_numpy(_native(chosen.coords))
    if chosen.pooled is not None:
        tensors["pooled"] = chosen.pooled
    if chosen.summary is not None:
        tensors["quantiles"] = chosen.summary.quantiles
    facts = {
        "best": None if chosen.summary is None else chosen.summary.best,
        "num_patches": chosen.num_patches,
        "num_nonfinite": chosen.num_nonfinite,
        "unit": chosen.unit,
        "patch_size": chosen.patch_size,
        "metadata": dict(chosen.metadata),
        "encoder_match": chosen.encoder_match,
        "scored_on": chosen.scored_on,
    }
    return tensors, facts


def score_tensors(known: SlideScores) -> dict[str, Tensor]:
    tensors = {"scores": known.scores}
    if known.pools is not None:
        tensors |= {"pool_sums": known.pools.sums, "pool_counts": known.pools.counts}
    return tensors


def scores_of(tensors: dict[str, Tensor], facts: dict[str, Any]) -> SlideScores:
    """Raises ValueError or KeyError where they are neither scores of patches nor a `QuestionScorer`'s vectors, or their
    pools are none."""
    scores = tensors["scores"]
    if (scores.ndim, scores.dtype) not in SCORES:
        raise ValueError(f"scores: found {scores.dtype} of {scores.ndim} dimensions, wanted scores or vectors")
    if "pool_sums" not in tensors:
        return SlideScores(scores)
    sums, counts = tensors["pool_sums"], tensors["pool_counts"]
    if sums.ndim != 2 or sums.dtype != torch.float64 or counts.dtype != torch.int64 or counts.shape != sums.shape[:1]:
        raise ValueError(f"pool_sums: found {sums.dtype} {tuple(sums.shape)}, wanted float64 [S, d] and S counts")
    return SlideScores(scores, SlidePools(sums, counts))


def selection_of(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Selection:
    """Raises ValueError, KeyError or TypeError where they do not make a selection."""
    _check(tensors, facts["num_patches"])
    unit, patch_size, encoder_match, best = (facts.pop(key) for key in ("unit", "patch_size", "encoder_match", "best"))
    return Selection(
        indices=tensors["indices"],
        scores=tensors["scores"],
        features=tensors["features"],
        coords=tensors["coords"].numpy() if "coords" in tensors else None,
        unit=None if unit is None else Unit(*unit),
        patch_size=None if patch_size is None else PatchSize(*patch_size),
        encoder_match=None if encoder_match is None else EncoderMatch(*encoder_match),
        pooled=tensors.get("pooled"),
        summary=None if best is None else ScoreSummary(best, tensors["quantiles"]),
        **facts,
    )


def _check(tensors: dict[str, Tensor], num_patches: int) -> None:
    indices, scores, features = (tensors[name] for name in ("indices", "scores", "features"))
    rises = bool((indices[1:] > indices[:-1]).all()) if indices.ndim == 1 else False
    if indices.dtype != torch.int64 or not rises or not len(indices):
        raise ValueError("indices: found other than rising rows, wanted at least one")
    if int(indices[0]) < 0 or int(indices[-1]) >= num_patches:
        raise ValueError(f"indices: found {int(indices[-1])}, wanted rows of {num_patches} patches")
    if scores.dtype != torch.float32 or scores.shape != indices.shape or not bool(torch.isfinite(scores).all()):
        raise ValueError("scores: found other than one finite score for each row, wanted float32")
    if features.ndim != 2 or len(features) != len(indices) or not features.is_floating_point():
        raise ValueError(f"features: found shape {tuple(features.shape)}, wanted one row for each of {len(indices)}")
    pooled = tensors.get("pooled")
    if pooled is not None and (pooled.dtype != torch.float32 or pooled.shape[1:] != features.shape[1:]):
        raise ValueError(f"pooled: found {pooled.dtype} {tuple(pooled.shape)}, wanted float32 [s, d]")
    quantiles = tensors.get("quantiles")
    if quantiles is not None and (quantiles.dtype != torch.float32 or quantiles.shape != (len(LEVELS),)):
        raise ValueError(f"quantiles: found shape {tuple(quantiles.shape)}, wanted ({len(LEVELS)},)")
    coords = tensors.get("coords")
    if coords is not None and coords.shape != (len(indices), 2):
        raise ValueError(f"coords: found shape {tuple(coords.shape)}, wanted ({len(indices)}, 2)")


def _native(coords: NDArray) -> NDArray:
    """In this machine's byte order, and in a dtype that torch has."""
    dtype = np.dtype(np.float64) if coords.dtype == np.longdouble else coords.dtype.newbyteorder("=")
    return np.ascontiguousarray(coords, dtype)
