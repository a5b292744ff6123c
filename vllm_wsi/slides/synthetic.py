"""A synthetic slide: random features in tissue-like clusters on a grid, from a seed. For demos and benchmarks."""

from __future__ import annotations

import os

import numpy as np

from .feature_file import write_features

PATCH_PX = 512
CLUSTERS = 12


def write_synthetic_slide(
    path: str | os.PathLike[str], num_patches: int, feature_dim: int, seed: int = 0, dtype: str = "float16"
) -> None:
    """Writes a feature file of random clusters that says in its metadata that it is synthetic."""
    rng = np.random.default_rng(seed)
    width = int(np.ceil(np.sqrt(num_patches)))
    rows = np.arange(num_patches)
    coords = np.stack([rows % width, rows // width], axis=1) * PATCH_PX
    centres = rng.standard_normal((CLUSTERS, feature_dim), np.float32)
    # Neighbours belong together, as tissue does: a cluster is a stripe of the slide.
    cluster = rows * CLUSTERS // num_patches
    features = np.empty((num_patches, feature_dim), dtype)
    for start in range(0, num_patches, 8192):
        part = cluster[start : start + 8192]
        features[start : start + 8192] = centres[part] + rng.standard_normal((len(part), feature_dim), np.float32)
    side = str(width * PATCH_PX)
    metadata = {
        "slide_id": f"synthetic-{seed}",
        "note": "random clusters, no tissue",  # of no encoder: any checkpoint of this size takes them
        "patch_size_level0": str(PATCH_PX),
        "width": side,
        "height": side,
    }
    write_features(path, features, coords, metadata)
