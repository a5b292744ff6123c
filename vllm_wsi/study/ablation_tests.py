"""Each arm of the ablations against the paper's, from the ablations' rows alone: over seeds, and over slides."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vllm_wsi.stats import holm, paired_interval, paired_p

from .table_numbers import rounded, significant

MEASURES = {"accuracy": "correct", "key_patch_recall": "key_patch_recall"}
"""Column of an arm's rows -> column of its questions' rows."""

UNITS = ("seeds", "slides")


def ablation_tests(
    rows: Sequence[Mapping[str, Any]], questions: Sequence[Mapping[str, Any]], reference: str, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for every other arm, length and measure: its difference from the reference arm, and two tests of it.

    - Over seeds, paired by seed: would other trainings differ so? `seeds_p` counts all sign patterns; the least of
      five seeds is 2 / 2^5 = 1/16.
    - Over slides, paired by question, each the mean over the seeds: would these same trained scorers differ so on other
      slides? With an interval. It says nothing of other trainings.

    `seeds_p_holm` and `slides_p_holm` are corrected for all rows of the table.

    Args:
        rows: arm, seed, length and the measures; numbers, or text as a CSV file has them, "" where not known.
        questions: arm, seed, length, slide, question and the measures; without them the columns of slides are "".
        reference: the arm that all others are compared with.
        seed: of the resampling.
    """
    by_seed = _values(rows, {name: name for name in MEASURES}, lambda row: str(row["seed"]))
    by_question = _values(questions, MEASURES, lambda row: (row["slide"], row["question"]))
    found = []
    for (arm, length, measure), values in by_seed.items():
        other = by_seed.get((reference, length, measure), {})
        shared = [unit for unit in values if unit in other]
        if arm == reference or not shared:
            continue
        ours, theirs = ([float(np.mean(of[unit])) for unit in shared] for of in (values, other))
        gaps = np.subtract(ours, theirs)
        row = {"arm": arm, "against": reference, "length": length, "measure": measure, "seeds": len(shared)}
        row |= {"difference": gaps.mean(), "least_of_seeds": gaps.min(), "most_of_seeds": gaps.max()}
        row |= {"seeds_p": paired_p(ours, theirs, shared, seed)}
        own, others = (by_question.get((one, length, measure), {}) for one in (arm, reference))
        found.append(row | _over_slides(own, others, seed))
    for unit in UNITS:
        _correct(found, f"{unit}_p")
    return [{name: _shown(name, value) for name, value in row.items()} for row in found]


def _values(
    rows: Sequence[Mapping[str, Any]], measures: Mapping[str, str], unit: Any
) -> dict[tuple[str, str, str], dict[Any, list[float]]]:
    """(arm, length, measure) -> unit -> its values; what is "" or NaN is left out."""
    found: dict[tuple[str, str, str], dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for measure, column in measures.items():
            if row[column] != "" and not math.isnan(value := float(row[column])):
                found[row["arm"], str(row["length"]), measure][unit(row)].append(value)
    return found


def _over_slides(own: Mapping[Any, list[float]], others: Mapping[Any, list[float]], seed: int) -> dict[str, Any]:
    shared = [one for one in own if one in others]
    if not shared:
        return dict.fromkeys(("slides", "low", "high", "slides_p"), "")
    slides = [slide for slide, _ in shared]
    ours, theirs = ([float(np.mean(of[one])) for one in shared] for of in (own, others))
    interval = paired_interval(ours, theirs, slides, seed=seed)
    p = paired_p(ours, theirs, slides, seed)
    return {"slides": len(set(slides)), "low": interval.low, "high": interval.high, "slides_p": p}


def _correct(rows: list[dict[str, Any]], column: str) -> None:
    """Puts Holm's correction beside a column of p-values."""
    tested = [row for row in rows if row[column] != ""]
    corrected = iter(holm([row[column] for row in tested]))
    for row in rows:
        row[f"{column}_holm"] = "" if row[column] == "" else next(corrected)


def _shown(name: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return significant(value) if "_p" in name else rounded(value)
