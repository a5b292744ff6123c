"""The patch types of a haystack world: where their centres lie in the space of the features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def type_centres(
    seed: int, feature_dim: int, num_common: int, num_rare: int, num_lookalikes: int
) -> NDArray[np.float64]:
    """[common + rare + look-alikes, d], each of mean 0 and variance 1.

    Each rare centre has a cosine of 0.5 with one of the common centres, and each look-alike, one for each of the first
    rare types, has 0.87 with its rare centre.
    """
    rng = np.random.default_rng([seed, 7])
    common = standardise(rng.standard_normal((num_common, feature_dim)))
    rare = standardise(rng.standard_normal((num_rare, feature_dim)))
    like = common[rng.integers(num_common, size=len(rare))]
    along = (rare * like).mean(axis=1, keepdims=True)
    across = standardise(rare - along * like)
    lookalikes = (np.sqrt(0.75) * like + 0.5 * across)[:num_lookalikes]
    return np.concatenate((common, 0.5 * like + np.sqrt(0.75) * across, lookalikes))


def rotation(seed: int, feature_dim: int, degrees: float) -> NDArray[np.float64]:
    """[d, d]: turns every vector of mean 0 by an angle and leaves its mean at 0.

    It turns in planes that are orthogonal to one another and to the vector of ones; where d is even, one direction is
    left over and stays as it is.
    """
    start = np.random.default_rng([seed, 8]).standard_normal((feature_dim, feature_dim))
    start[:, 0] = 1
    basis = np.linalg.qr(start)[0]
    angle = np.deg2rad(degrees)
    turn = np.eye(feature_dim)
    for i in range(1, feature_dim - 1, 2):
        turn[i : i + 2, i : i + 2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return basis @ turn @ basis.T


def standardise(rows: NDArray) -> NDArray:
    """Rows of mean 0 and variance 1."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / rows.std(axis=1, keepdims=True)
