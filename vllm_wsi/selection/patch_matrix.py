"""All patches of a slide that may be kept, as one matrix in memory: what the baselines choose from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_wsi.slides import FeatureFile

from .chunk_reader import ChunkReader


class Patches(NamedTuple):
    """The patches of one slide that may be kept."""

    slide: FeatureFile
    rows: Tensor  # int64 [m], ascending: the rows whose features are all finite
    features: Tensor  # fp32 [m, d], theirs; a policy may overwrite it


def finite_patches(slide: FeatureFile) -> tuple[Patches, float]:
    """(the patches of a slide whose features are all finite, decoded from any dtype; seconds of reading)."""
    reader = ChunkReader(slide)
    features, rows, m = torch.empty((slide.num_patches, slide.feature_dim)), [], 0
    for start, chunk in reader.chunks():
        chunk = chunk.float()
        finite = torch.isfinite(chunk.abs().amax(dim=1)).nonzero()[:, 0]
        torch.index_select(chunk, 0, finite, out=features[m : m + len(finite)])
        rows.append(start + finite)
        m += len(finite)
    return Patches(slide, torch.cat(rows), features[:m]), reader.read_seconds


def where(slide: FeatureFile) -> str:
    return f"{slide.name}: {slide.key or 'features'}: found"
