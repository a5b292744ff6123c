"""Tissue of any stain on any glass: what differs from the glass of its own slide, in optical density.

A stain absorbs some colours more than others, a shade takes from all alike: so a small difference in colour counts as
tissue, and a difference in brightness alone only where it is large. Nothing here knows a stain.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

GLASS_BRIGHT = 150  # the darkest that glass is taken for, of 255
GLASS_TINT = 45  # the largest difference of its channels
GLASS_SHARE = 0.05  # of the flat bright pixels that its brightness must hold
MODE_WIDTH = 6  # brightness on each side of the mode that counts as glass
COLOUR_OD, SHADE_OD = 0.03, 0.15  # differences in optical density that are tissue at least
NOISE = 6  # or so many times what the glass itself varies
FLAT = 3.0  # standard deviation of the brightness of 3 x 3 pixels of a flat place
DARK = 60  # brightness below which a ground is dark
DARK_SHARE = 0.5
WHITE_GLASS = (240.0, 240.0, 240.0)


class Glass(NamedTuple):
    """The glass of a slide, as its overview shows it."""

    colour: tuple[float, float, float]
    colour_noise: float  # optical density, of colour and of brightness
    shade_noise: float
    found: bool = True  # False: no place looks like glass, and white is taken for it


def valid_pixels(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """[h, w]: what was scanned; scanners and readers fill the rest with pure white or black."""
    return ~((picture == 255).all(axis=2) | (picture == 0).all(axis=2))


def has_dark_ground(picture: NDArray[np.uint8]) -> bool:
    """Whether most of the picture is dark and flat, as in fluorescence, and none of it is glass.

    Args:
        picture: RGB [h, w, 3].
    """
    brightness = picture.max(axis=2)
    scanned = valid_pixels(picture)
    if not scanned.any():
        return bool((brightness == 0).mean() > DARK_SHARE)
    return bool((brightness < DARK).mean() > DARK_SHARE) and not find_glass(picture).found


def find_glass(picture: NDArray[np.uint8]) -> Glass:
    """The brightest flat colour that enough of the picture has, if glass may look like it.

    Args:
        picture: RGB [h, w, 3].
    """
    numbers = picture.astype(np.float32)
    brightness = numbers.mean(axis=2)
    mean = ndimage.uniform_filter(brightness, 3)
    spread = np.sqrt(np.maximum(ndimage.uniform_filter(brightness**2, 3) - mean**2, 0))
    tint = numbers.max(axis=2) - numbers.min(axis=2)
    pink = (numbers[..., 0] + numbers[..., 2]) / 2 - numbers[..., 1]  # no glass is, but pale eosin
    flat = valid_pixels(picture) & (spread < FLAT) & (brightness >= GLASS_BRIGHT) & (tint <= GLASS_TINT) & (pink < 8)
    counts = np.bincount(brightness[flat].round().astype(np.int64), minlength=256)
    around = np.convolve(counts, np.ones(2 * MODE_WIDTH + 1), "same")
    enough = np.flatnonzero(around >= max(GLASS_SHARE * counts.sum(), 1e-3 * brightness.size, 1))
    if not len(enough):
        return Glass(WHITE_GLASS, 0.0, 0.0, found=False)
    brightest = enough[-1]
    lowest = max(0, brightest - 2 * MODE_WIDTH)
    mode = lowest + int(counts[lowest : brightest + 1].argmax())
    chosen = flat & (np.abs(brightness - mode) <= MODE_WIDTH)
    red, green, blue = np.median(numbers[chosen], axis=0).tolist()
    glass = Glass((red, green, blue), 0.0, 0.0)
    colour, shade = differences(picture, glass)
    return glass._replace(colour_noise=_spread(colour[chosen]), shade_noise=_spread(shade[chosen]))


def _spread(values: NDArray) -> float:
    """A robust standard deviation about 0."""
    return float(1.4826 * np.median(np.abs(values)))


def differences(picture: NDArray[np.uint8], glass: Glass) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(colour, shade) [h, w]: optical density above the glass, unequal and equal over the channels."""
    density = np.log((np.asarray(glass.colour, np.float32) + 1) / (picture.astype(np.float32) + 1))
    shade = density.mean(axis=2)
    colour = np.sqrt(((density - shade[..., None]) ** 2).sum(axis=2))
    return colour, shade * np.float32(np.sqrt(3))


def tissue_mask(picture: NDArray[np.uint8], glass: Glass, smooth_px: float = 1.0) -> NDArray[np.bool_]:
    """[h, w]: what differs from the glass.

    Args:
        picture: RGB [h, w, 3], an overview.
        glass: as `find_glass` found it there.
        smooth_px: standard deviation of the blur that takes away a scanner's and a JPEG's noise.
    """
    smooth = ndimage.gaussian_filter(picture.astype(np.float32), (smooth_px, smooth_px, 0))
    colour, shade = differences(smooth, glass)
    coloured = (colour > max(COLOUR_OD, NOISE * glass.colour_noise)) & (shade > -COLOUR_OD)
    shaded = shade > max(SHADE_OD, NOISE * glass.shade_noise)
    scanned = valid_pixels(picture)
    # A line of fill at the edge of the scan is blurred into what lies beside it.
    inside = ndimage.binary_erosion(scanned, iterations=2, border_value=1) if not scanned.all() else scanned
    return (coloured | shaded) & inside


def clean(mask: NDArray[np.bool_], close_px: int, least_px: float) -> NDArray[np.bool_]:
    """Gaps up to twice `close_px` wide are closed, pieces and holes of fewer than `least_px` pixels are gone."""
    if not mask.any():
        return mask
    reach = ndimage.distance_transform_edt(~mask) <= close_px  # a disc, at a cost that does not grow with it
    closed = mask | (ndimage.distance_transform_edt(np.pad(reach, 1, constant_values=True))[1:-1, 1:-1] > close_px)
    for value in (True, False):
        labels, count = ndimage.label(closed == value)
        if count:
            sizes = np.bincount(labels.ravel())
            sizes[0] = 1 << 62  # the other value
            closed[sizes[labels] < least_px] = not value
    return closed
