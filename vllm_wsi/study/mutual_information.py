"""Mutual information between what is kept of slides and what is dropped, by the formula for Gaussians."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

SHRINKAGE = 1e-3
"""Weight of the identity in the shrunk correlation matrix of `gaussian_mutual_information`. It holds a canonical
correlation of 1 at 3.1 nats rather than infinity and takes 0.002 nats off one of 0.8."""


def gaussian_mutual_information(
    x: ArrayLike, y: ArrayLike, num_components: int = 4, permutations: int = 50, seed: int = 0
) -> tuple[float, float]:
    """Linear dependence of two paired sets of vectors, as the mutual information of Gaussians, and its noise level.

    One row is one slide: say the mean of the kept patches' features, and the mean of the dropped ones'. Each set is
    reduced by PCA to num_components. With rho the canonical correlations of the two, shrunk by SHRINKAGE, the raw
    estimate is -1/2 sum(log(1 - rho^2)) in nats. It is biased upwards by about num_components^2 / (2 slides) even
    for independent sets, so its mean over random pairings of the rows is taken off.

    What it is: a measure of how well a linear map predicts the leading components of one set from those of the
    other, across slides; exact for jointly Gaussian components as the slides grow in number.

    What it is not: all the information that the two share. It sees no nonlinear dependence, nothing outside the
    leading components (PCA picks them by variance, not by what is shared), and nothing within a slide. What marks
    the slide as a whole, as stain, scanner and organ do, counts as shared. It needs many more slides than
    components: the least allowed, four times as many, keeps the formula defined, not the result precise; 50 times
    as many is a sound study. Do not compare values of different num_components or numbers of slides.

    Args:
        x: [slides, p], real and finite, one row a slide.
        y: [slides, q], of the same slides in the same order.
        num_components: at least 1; fewer are used where a set has a lower rank.
        permutations: random pairings, at least 1.
        seed: of the pairings.

    Returns:
        (information, noise) in nats: the corrected estimate, about 0 or a little below for independent sets, and the
        95th percentile of the same for random pairings. An estimate up to the noise does not show dependence.

    Raises:
        ValueError: fewer slides than 4 * num_components, numbers of slides that differ, a set that is not
            two-dimensional or not finite, or an argument below 1.
    """
    x, y = _slide_vectors("x", x), _slide_vectors("y", y)
    if len(x) != len(y):
        raise ValueError(f"y: found {len(y)} slides, wanted {len(x)}, as many as in x")
    if num_components < 1 or permutations < 1:
        raise ValueError(f"found {num_components} components and {permutations} permutations, wanted at least 1 each")
    if len(x) < 4 * num_components:
        raise ValueError(f"found {len(x)} slides, wanted at least {4 * num_components}, 4 for each component")
    x, y = _whitened_components(x, num_components), _whitened_components(y, num_components)
    raw = float(_information(x.T @ y))
    order = np.tile(np.arange(len(y)), (permutations, 1))
    order = np.random.default_rng(seed).permuted(order, axis=1)
    null = _information(x.T @ y[order])
    bias = float(null.mean())
    return raw - bias, float(np.quantile(null, 0.95)) - bias


def _slide_vectors(name: str, vectors: ArrayLike) -> NDArray[np.float64]:
    """vectors as fp64 [slides, dim], checked: two-dimensional and finite."""
    array = np.asarray(vectors, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name}: found shape {list(array.shape)}, wanted [slides, dim]")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: found {np.count_nonzero(~np.isfinite(array))} NaN or infinite, wanted none")
    return array


def _whitened_components(vectors: NDArray[np.float64], num_components: int) -> NDArray[np.float64]:
    """[slides, components]: the leading principal components, orthonormal columns; none that is mere rounding."""
    left, scale, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    rounding = max(vectors.shape) * np.finfo(np.float64).eps * np.linalg.norm(vectors)
    return left[:, : min(num_components, np.count_nonzero(scale > rounding))]


def _information(cross: NDArray[np.float64]) -> NDArray[np.float64]:
    """[...] in nats, of cross-correlations [..., p, q] between whitened components."""
    if 0 in cross.shape[-2:]:
        return np.zeros(cross.shape[:-2])
    rho = (1 - SHRINKAGE) * np.linalg.svd(cross, compute_uv=False)
    return -0.5 * np.log1p(-np.square(rho)).sum(-1)
