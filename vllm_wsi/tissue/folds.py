"""Folds of patients: no patient's patches are on both sides of a split."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SettingsError

Side = Literal["train", "test", "all"]
"""Of a fold: `test` are the patients of the fold, `train` all others, `all` both."""


def patient_folds(
    patients: NDArray[np.str_], labels: NDArray[np.bool_], num_folds: int = 3, seed: int = 0
) -> NDArray[np.int64]:
    """[n] the fold of each patch, the same for all patches of a patient.

    Stratified by the share of tumour: patients are sorted by it (ties by lot), and of each `num_folds` neighbours one
    goes to each fold, by lot.

    Args:
        patients, labels: [n], of each patch.

    Raises:
        SettingsError: fewer than two folds, or more folds than patients.
    """
    names, of_patch = np.unique(patients, return_inverse=True)
    if not 2 <= num_folds <= len(names):
        raise SettingsError(f"num_folds: found {num_folds}, wanted 2 to {len(names)}, the number of patients")
    rng = np.random.default_rng([seed, num_folds])
    share = np.bincount(of_patch, weights=labels) / np.bincount(of_patch)
    order = np.lexsort((rng.random(len(names)), share))
    folds = np.empty(len(names), np.int64)
    for first in range(0, len(order), num_folds):
        block = order[first : first + num_folds]
        folds[block] = rng.permutation(num_folds)[: len(block)]
    return folds[of_patch]


def rows_of_side(folds: NDArray[np.int64], fold: int, side: Side) -> NDArray[np.int64]:
    """Rows of the patches on one side of a fold, ascending.

    Raises:
        SettingsError: there is no such fold or side.
    """
    num_folds = int(folds.max()) + 1
    if not 0 <= fold < num_folds:
        raise SettingsError(f"fold: found {fold}, wanted 0 to {num_folds - 1}")
    if side not in get_args(Side):
        raise SettingsError(f"side: found {side!r}, wanted one of {', '.join(get_args(Side))}")
    chosen = {"train": folds != fold, "test": folds == fold, "all": np.ones(len(folds), bool)}[side]
    return np.flatnonzero(chosen)


def part_of_patients(
    rows: NDArray[np.int64], patients: NDArray[np.str_], part: tuple[float, float], seed: int = 0
) -> NDArray[np.int64]:
    """Those of `rows` whose patients stand in this part of the rows' patients, which are put in an order by lot.

    Two parts that meet, such as (0, 0.6) and (0.6, 1), share no patient and leave none out.

    Args:
        rows: of patches, ascending.
        patients: of all patches.
        part: where the part begins and ends, in [0, 1].

    Raises:
        SettingsError: the part holds no patient.
    """
    names = np.unique(patients[rows])
    order = np.random.default_rng([seed, 7]).permutation(names)
    first, last = (round(edge * len(names)) for edge in part)
    if first >= last:
        raise SettingsError(f"part: found {part[0]:g} to {part[1]:g} of {len(names)} patients, wanted at least one")
    return rows[np.isin(patients[rows], order[first:last])]
