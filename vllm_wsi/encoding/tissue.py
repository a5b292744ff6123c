"""Where the tissue is: what absorbs light beside the glass, whatever its stain.

The glass is found in the slide itself, so that its tint does not matter. Tissue is what lies at some distance from it
in optical density. Red is no condition: immunohistochemistry is blue and brown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

from vllm_wsi.errors import SlideError

MASK_VERSION = "otsu@2"  # feature files name it; raised with every change of what is taken for tissue
BLACK = 16  # of 255; scanners fill with it what they did not scan
DARK = 60  # of 255; glass that lets light through is brighter
GLASS_BRIGHT = 130  # of 255, the least of a glass's three channels
GLASS_TINT = 50  # between its channels at most
FLAT = 3.0  # of 255: standard deviation of glass within a few pixels
GLASS_RANGE = 24  # of 255: brightest to darkest glass of one slide
GLASS_SHARE = 0.005  # of the scanned pixels, below which no glass was found
GAPS_SHARE = 0.1  # of the scanned pixels: where fewer are flat, glass shows in the gaps of tissue alone,
GAPS_BRIGHTER = 5  # of 255, and the brightest is nearer to it than the flattest
PEAK_SHARE = 0.15  # of the flat pixels: a brighter peak that holds fewer is dirt or a bubble
NO_GLASS = 245.0  # what a slide of tissue alone is compared with, unless it has something brighter
LEAST_DENSITY = 0.018  # optical density beside the glass; below lies the noise of JPEG
MOST_DENSITY = 0.04  # palest tissue that is kept beside dark tissue
SHADE_DENSITY = 0.12  # of a shadow at most
GREY = 0.25  # difference of its channels' densities, over their mean
INK_DENSITY = 0.45  # pens are thicker than stains
INK_ROUGHNESS = 0.12  # and smoother: deviation of the density within a few pixels, over its mean


@dataclass(frozen=True)
class Tissue:
    """What an overview shows."""

    mask: NDArray[np.bool_]  # [h, w]
    ink: NDArray[np.bool_]  # [h, w] pen marks, which are no tissue
    glass: tuple[int, int, int] | None  # its colour; None: none was found
    share: float  # of the scanned pixels that are tissue
    rough_share: float  # of them that are not flat: another look at the same, to compare with
    warnings: tuple[str, ...]


def find_tissue(rgb: NDArray[np.uint8], scanned: NDArray[np.bool_], name: str, patch_side: float) -> Tissue:
    """Tells tissue from glass, ink and what was not scanned.

    Args:
        rgb: overview [h, w, 3].
        scanned: [h, w].
        name: of the slide, for errors.
        patch_side: edge of a patch, in pixels of the overview.

    Raises:
        SlideError: no tissue.
    """
    smooth = ndimage.gaussian_filter(rgb.astype(np.float32), (1, 1, 0))
    dark = _most(smooth) <= BLACK
    black = ndimage.binary_dilation(ndimage.binary_opening(dark, iterations=2), iterations=3)
    seen = ndimage.binary_erosion(scanned, iterations=1, border_value=1) & ~black
    if not seen.any():
        raise SlideError(f"{name}: found nothing that was scanned, wanted tissue on glass")
    flat = _deviation(_mean(smooth)) < FLAT
    seen &= ~_find_fill(rgb, smooth, seen, flat)
    glass, noise = _find_glass(smooth, seen, flat)
    colour = np.maximum(smooth[seen].max(axis=0), NO_GLASS) if glass is None else glass
    absorbed = np.clip(np.log10((colour + 1) / (smooth + 1)), 0, None)  # nothing makes glass brighter
    density = np.sqrt(sum(absorbed[..., i] ** 2 for i in range(3)))
    ink = _find_ink(absorbed, density) & seen
    found = seen & ~ink & ~_find_shade(absorbed, density, flat)
    threshold = _threshold(density[found], noise)
    mask = _tidied((density > threshold) & found, patch_side) & found
    count = int(seen.sum())
    share, rough_share = mask.sum() / count, (seen & ~ink & ~flat).sum() / count
    if not mask.any():
        raise SlideError(f"{name}: found no tissue, wanted some; --tissue none takes the whole slide")
    warnings = _doubts(mask, flat, glass, share, rough_share, ink.sum() / count)
    rounded = None if glass is None else tuple(glass.round().astype(int).tolist())
    return Tissue(mask, ink, rounded, float(share), float(rough_share), warnings)


def is_dark_ground(rgb: NDArray[np.uint8], scanned: NDArray[np.bool_]) -> bool:
    """Whether the picture is light on darkness, and not glass with light behind it, be it with black borders."""
    pixels = rgb[scanned]
    if not len(pixels):
        return False
    brightest, least = _most(pixels), _least(pixels)
    lit = brightest > DARK
    if lit.mean() < 0.002:
        return True
    glass_like = (least > GLASS_BRIGHT) & (brightest - least < GLASS_TINT)
    # Glass is one colour; what shines on darkness has every brightness.
    histogram = np.bincount(pixels[glass_like].mean(axis=1).astype(int), minlength=256)
    if np.convolve(histogram, np.ones(9), "same").max() > 0.1 * lit.sum() and glass_like.sum() > 0.01 * len(pixels):
        return False
    return bool(lit.mean() < 0.5 or np.median(least) < 25)


# NumPy takes ten times as long along an axis of three.
def _least(colours: NDArray) -> NDArray:
    return np.minimum(np.minimum(colours[..., 0], colours[..., 1]), colours[..., 2])


def _most(colours: NDArray) -> NDArray:
    return np.maximum(np.maximum(colours[..., 0], colours[..., 1]), colours[..., 2])


def _range(colours: NDArray) -> NDArray:
    return _most(colours) - _least(colours)


def _mean(colours: NDArray) -> NDArray:
    return (colours[..., 0] + colours[..., 1] + colours[..., 2]) / 3


def _deviation(grey: NDArray[np.float32], size: int = 5) -> NDArray[np.float32]:
    mean = ndimage.uniform_filter(grey, size)
    return np.sqrt(np.clip(ndimage.uniform_filter(grey**2, size) - mean**2, 0, None))


def _find_fill(
    rgb: NDArray[np.uint8], smooth: NDArray[np.float32], seen: NDArray[np.bool_], flat: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Where the scanner wrote one bright colour instead of what it did not scan, which is not the glass's colour.

    What was scanned has straight edges there, and glass of its own.
    """
    none = np.zeros_like(seen)
    lowest, highest = (extreme(rgb, size=(5, 5, 1)) for extreme in (ndimage.minimum_filter, ndimage.maximum_filter))
    constant = (_most(highest - lowest) == 0) & (_least(smooth) > GLASS_BRIGHT) & seen
    if constant.sum() < 0.02 * seen.sum():
        return none
    fill = ndimage.binary_dilation(constant, iterations=2)
    rest = ndimage.binary_fill_holes(seen & ~fill)
    if not rest.any():
        return none
    edge = rest & ~ndimage.binary_erosion(rest, border_value=1)
    straight = ndimage.binary_opening(edge, np.ones((1, 9))) | ndimage.binary_opening(edge, np.ones((9, 1)))
    tint = _range(smooth)
    inner = ndimage.binary_erosion(rest, iterations=4)  # without the rim, where the fill's colour is blurred
    like = inner & flat & (_least(smooth) > GLASS_BRIGHT) & (tint < GLASS_TINT / 2)
    if straight.sum() < 0.8 * edge.sum() or like.sum() <= 0.02 * inner.sum():
        return none
    if like.sum() > 0.97 * inner.sum() and np.median(tint[like]) > GLASS_TINT / 4:
        return none  # one pale tint on one constant colour: a stain rather than glass
    return ~rest


def _find_glass(
    smooth: NDArray[np.float32], seen: NDArray[np.bool_], flat: NDArray[np.bool_]
) -> tuple[NDArray[np.float32] | None, float]:
    """Its colour [3] and how far, in density, its own pixels lie from it: the brightest flat colour that is common."""
    like = (_least(smooth) > GLASS_BRIGHT) & (_range(smooth) < GLASS_TINT)
    candidates = smooth[seen & flat & like]
    if len(candidates) < max(16, GLASS_SHARE * seen.sum()):
        return None, 0.0
    grey = candidates.mean(axis=1)
    histogram = np.convolve(np.bincount(grey.astype(int), minlength=256), np.ones(3), "same")
    common = np.flatnonzero(histogram >= PEAK_SHARE * len(candidates))
    top = int(common[-1]) if len(common) else int(histogram.argmax())
    while top > 0 and histogram[top - 1] >= histogram[top]:
        top -= 1
    # Where the light falls off, glass is no peak but a plateau: down to where there is little of it, or more again.
    low, fewest, much = top, histogram[top], 0.6 * histogram[top]
    while low > max(0, top - GLASS_RANGE) and 0.2 * histogram[top] < histogram[low - 1] < max(1.5 * fewest, much):
        low -= 1
        fewest = min(fewest, histogram[low])
    if len(candidates) < GAPS_SHARE * seen.sum():
        bright = smooth[seen & like]
        least = np.quantile(bright.mean(axis=1), 0.99)
        if top < least - GAPS_BRIGHTER:
            return np.median(bright[bright.mean(axis=1) >= least], axis=0), 0.0
    own = candidates[(grey >= low - 1) & (grey <= top + 3)]
    colour = np.median(own, axis=0)
    density = np.linalg.norm(np.clip(np.log10((colour + 1) / (own + 1)), 0, None), axis=1)
    return colour, float(np.quantile(density, 0.99))


def _threshold(density: NDArray[np.float32], noise: float) -> float:
    least = max(LEAST_DENSITY, 1.3 * noise)
    if not len(density) or np.ptp(density) == 0:
        return least
    return float(np.clip(threshold_otsu(density), least, max(least, MOST_DENSITY)))


def _find_shade(
    absorbed: NDArray[np.float32], density: NDArray[np.float32], flat: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Glass where there is less light, as beside a cover slip's edge: flat, and darker in all channels alike, which no
    stain is."""
    grey = _range(absorbed) < GREY * _mean(absorbed)
    return ndimage.binary_opening(flat & grey & (density < SHADE_DENSITY), iterations=3)


def _find_ink(absorbed: NDArray[np.float32], density: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Green, blue and black pen: denser and smoother than a stain."""
    red, green, blue = np.moveaxis(absorbed, 2, 0)
    smooth = _deviation(density) < INK_ROUGHNESS * density
    is_green = (green < 0.75 * red) & (green < 0.9 * blue)
    is_blue = (blue < 0.55 * red) & (green > 1.2 * blue) & (red > 0.55)
    is_black = (_least(absorbed) > 0.6) & (_range(absorbed) < 0.25)
    thick = smooth & (density > INK_DENSITY) & (is_green | is_blue | is_black)
    return ndimage.binary_dilation(ndimage.binary_opening(thick, iterations=2), iterations=3)


def _tidied(mask: NDArray[np.bool_], patch_side: float) -> NDArray[np.bool_]:
    """Without specks, and without gaps that are far smaller than a patch."""
    area = patch_side**2
    mask = ndimage.binary_closing(np.pad(mask, 2, mode="edge"), iterations=2)[2:-2, 2:-2]
    mask = remove_small_holes(mask, max_size=int(area / 4))
    return remove_small_objects(mask, max_size=int(area / 4))


def _doubts(
    mask: NDArray[np.bool_],
    flat: NDArray[np.bool_],
    glass: NDArray[np.float32] | None,
    share: float,
    rough_share: float,
    ink_share: float,
) -> tuple[str, ...]:
    doubts = []
    if glass is None:
        doubts.append("found no glass to compare with")
    if (mask & flat).sum() > 0.8 * mask.sum():
        doubts.append(f"{(mask & flat).sum() / mask.sum():.0%} of the tissue found is as flat as glass")
    if rough_share > 2 * share and rough_share - share > 0.02:
        doubts.append(f"found tissue on {share:.1%} of the slide, while {rough_share:.1%} of it look like some")
    if ink_share > 0.005:
        doubts.append(f"left out pen marks on {ink_share:.1%} of the slide")
    return tuple(doubts)
