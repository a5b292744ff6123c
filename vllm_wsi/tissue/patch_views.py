"""Views of a patch: what flips, turns and another stain make of the same tissue.

View 0 is the patch as it is. Every further view is one of the eight flips and quarter turns, with the amounts of
haematoxylin, eosin and residual changed a little (Tellez et al., IEEE TMI 2018: stain augmentation in the space of
colour deconvolution; Ruifrok and Johnston, Anal Quant Cytol Histol 2001, for its vectors).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

VIEWS_VERSION = 1
"""Changes with what the views are, so that features of others are not taken for them."""

STAIN_TO_RGB = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density in R, G, B of haematoxylin, eosin and residual."""

RGB_TO_STAIN = np.linalg.inv(STAIN_TO_RGB)
FACTOR = (0.8, 1.25)  # of each stain
SHIFT = 0.28  # added to or taken from each stain, in natural optical density
DARKEST = 1.0  # of 255: the optical density of 0 is infinite


def flipped(images: NDArray[np.uint8], element: int) -> NDArray[np.uint8]:
    """[n, h, h, 3] turned and flipped by one of the eight symmetries of a square; 0 changes nothing."""
    turned = np.rot90(images, element % 4, axes=(1, 2))
    return turned[:, :, ::-1] if element % 8 >= 4 else turned


def stained(images: NDArray[np.uint8], factor: NDArray, shift: NDArray) -> NDArray[np.uint8]:
    """[n, h, w, 3] with other amounts of stain: amount * factor + shift, in natural optical density.

    Args:
        factor, shift: [n, 3], of haematoxylin, eosin and residual.
    """
    density = -np.log(np.maximum(images, DARKEST) / 255)
    amounts = density @ RGB_TO_STAIN
    changed = (amounts * factor[:, None, None] + shift[:, None, None]) @ STAIN_TO_RGB
    return np.rint(np.clip(255 * np.exp(-changed), 0, 255)).astype(np.uint8)


def view_of(images: NDArray[np.uint8], view: int, first: int = 0, seed: int = 0) -> NDArray[np.uint8]:
    """[n, h, h, 3]: one view of each of n patches.

    Args:
        view: 0: as they are; v: flipped by element v % 8, and stained by lots of (seed, v, patch).
        first: number of the first patch, so that a patch's lots do not depend on the batch that it is in.
    """
    if view == 0:
        return images
    lots = np.array([np.random.default_rng([seed, view, first + i]).uniform(-1, 1, (2, 3)) for i in range(len(images))])
    low, high = np.log(FACTOR)
    factor = np.exp(low + (high - low) * (lots[:, 0] + 1) / 2)
    return np.ascontiguousarray(stained(flipped(images, view), factor, lots[:, 1] * SHIFT))
