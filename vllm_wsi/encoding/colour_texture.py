"""The built-in patch encoder: colour and texture statistics, no weights, no learning.

Good enough to see the way of a slide from image to answer on any machine; it knows nothing of histology, and no
claim about answers may rest on it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2hed
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern
from skimage.filters import sobel
from skimage.measure import shannon_entropy

from .encoders import PatchScale

FEATURE_DIM = 64
QUANTILES = (0.1, 0.5, 0.9)
LBP_POINTS = 8
LBP_RADII = (1, 2, 4)
GLCM_LEVELS = 16
GLCM_DISTANCES = (1, 4)
GLCM_PROPERTIES = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation")


class ColourTexture:
    """`colour-texture@1`: 64 numbers of each patch; a change of any of them is a new revision.

    RGB, stain (haematoxylin, eosin, DAB by colour deconvolution) and saturation statistics, uniform local binary
    patterns, grey-level co-occurrence, edges and entropy, all of scikit-image. Deterministic.
    """

    id = "colour-texture@1"
    feature_dim = FEATURE_DIM
    input_px: int | None = None  # any
    patch: PatchScale | None = None
    on_gpu = False

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[n, 64] of RGB patches [n, h, w, 3]."""
        return np.stack([_describe(patch) for patch in patches]).astype(np.float32)


def _describe(patch: NDArray[np.uint8]) -> NDArray[np.float64]:
    rgb = np.ascontiguousarray(patch.reshape(-1, 3).T) / np.float32(255)
    hed = 10 * np.ascontiguousarray(rgb2hed(patch).reshape(-1, 3).T.astype(np.float32))
    grey = np.round(patch @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.uint8)
    light, dark = rgb.max(axis=0), rgb.min(axis=0)
    saturation = (light - dark) / np.maximum(light, 1 / 255)
    parts = [rgb.mean(axis=1), rgb.std(axis=1), hed.mean(axis=1), hed.std(axis=1)]
    parts.append(np.quantile(hed, QUANTILES, axis=1).ravel())
    for radius in LBP_RADII:
        pattern = local_binary_pattern(grey, LBP_POINTS, radius, "uniform").astype(np.int64)
        parts.append(np.bincount(pattern.ravel(), minlength=LBP_POINTS + 2) / pattern.size)
    angles = [0, np.pi / 2]
    pairs = graycomatrix(grey // (256 // GLCM_LEVELS), GLCM_DISTANCES, angles, GLCM_LEVELS, symmetric=True, normed=True)
    for name in GLCM_PROPERTIES:
        scale = (GLCM_LEVELS - 1) ** {"contrast": 2, "dissimilarity": 1}.get(name, 0)
        parts.append(graycoprops(pairs, name).mean(axis=1) / scale)
    edges = sobel(grey / 255)
    parts.append(np.array([edges.mean(), saturation.mean(), shannon_entropy(grey) / 8]))
    return np.concatenate(parts)
