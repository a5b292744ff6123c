"""Features of all patches in several views, encoded once and kept in a folder."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.encoding.encoders import PatchEncoder
from vllm_wsi.errors import SlideError
from vllm_wsi.files import replacing
from vllm_wsi.parts.fetch import cache_folder

from .patch_views import VIEWS_VERSION, view_of
from .tissue_patches import TissuePatches

logger = logging.getLogger(__name__)
BATCH = 64


def view_features(
    patches: TissuePatches, encoder: PatchEncoder, num_views: int = 1, cache: str | Path | None = None, seed: int = 0
) -> tuple[NDArray[np.float16], ...]:
    """Features of all patches in the views 0 .. num_views - 1, float16 [n, d] each, mapped from files.

    What is not in the cache yet is encoded and kept there: one .npy file a view, in a folder named by encoder, archive
    and seed. A file appears under its name whole. View 0 is the same for every seed.

    Args:
        cache: the folder that holds these folders; None: `tissue` in the package's cache (`VLLM_WSI_CACHE`).
        seed: of the views' stains.

    Raises:
        SlideError: a broken picture, a feature that float16 cannot hold, or a file in the cache that does not fit.
    """
    root = cache_folder() / "tissue" if cache is None else Path(cache)
    name = re.sub(r"[^\w.@-]+", "_", encoder.id)
    found = []
    for view in range(num_views):
        lots = f"-views{VIEWS_VERSION}-seed{seed}" if view else ""
        path = root / f"{name}-{patches.sha256[:12]}" / f"view{view:02d}{lots}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            features = _encode(patches, encoder, view, seed)
            with replacing(path) as file:
                np.save(file, features)
        found.append(_load(path, len(patches), encoder.feature_dim))
    return tuple(found)


def _encode(patches: TissuePatches, encoder: PatchEncoder, view: int, seed: int) -> NDArray[np.float16]:
    began = time.monotonic()
    features = np.empty((len(patches), encoder.feature_dim), np.float16)
    with np.errstate(over="ignore"):  # told below
        for first in range(0, len(patches), BATCH):
            images = view_of(patches.images[first : first + BATCH], view, first, seed)
            features[first : first + len(images)] = encoder.encode(images)
    if not np.isfinite(features).all():
        raise SlideError(
            f"{patches.archive}: found a feature of {encoder.id} in view {view} that is not finite in float16, "
            "wanted finite ones"
        )
    seconds = time.monotonic() - began
    logger.info(
        "%s: %d patches encoded by %s (view %d) in %.0f s",
        patches.archive.name,
        len(patches),
        encoder.id,
        view,
        seconds,
    )
    return features


def _load(path: Path, num_patches: int, feature_dim: int) -> NDArray[np.float16]:
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SlideError(f"{path}: found no readable .npy file ({error}); remove it to have it made again") from error
    if features.shape != (num_patches, feature_dim) or features.dtype != np.float16:
        raise SlideError(
            f"{path}: found {features.dtype} of shape {features.shape}, wanted float16 ({num_patches}, {feature_dim}); "
            "remove it to have it made again"
        )
    return features
