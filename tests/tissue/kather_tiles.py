"""A small file of the eight-class set's form."""

import numpy as np

from vllm_wsi.tissue.kather import KATHER, TISSUES


def write_tiles(folder, counts=(9, 7, 0, 5, 2, 12, 6, 4), slides=("01", "02"), centres=None):
    """Each slide has `counts` tiles of the eight classes.

    Args:
        centres: [8, d] of the classes; None: features of very different scales, the last of which does not vary.
    """
    y = np.tile(np.repeat(np.arange(8), counts), len(slides))
    rng = np.random.default_rng(0)
    if centres is None:
        x = rng.normal(y[:, None], 1, (len(y), 5)) * [1, 10, 100, 1e-3, 0]
    else:
        x = rng.normal(centres[y], 1)
    slide = np.repeat(slides, sum(counts))
    np.savez(folder / KATHER, X=x.astype(np.float32), y=y, classes=list(TISSUES), slide=slide)
    return folder
