"""Tables of a tissue study, from its rows alone, so that rows of several folds and seeds make one table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vllm_wsi.stats import Interval, holm, mean_interval, paired_p

from .study import LEARNED
from .table_numbers import rounded, significant
from .tissue_measures import calibration_bins, expected_calibration_error

Row = Mapping[str, Any]
ANY = "any"
"""Share of a row about all of a length's slides, the clean ones too."""


def selection_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Recall and precision of the kept patches by length, share and policy, means over slides with 95 % intervals.

    `found` is the share of slides of which at least one tumour patch was kept. `recall_of_probe` is the ratio of the
    mean recall to that of the linear probe. `p` is of the sign-flip test over slides of the recall against the learned
    policy's, `p_holm` corrected for all rows of the table. Clean slides have no row. Intervals are over slides: those
    of one fold share patients and patches, so they say nothing of other patients.

    Args:
        rows: as `TissueStudy.selections`; numbers, or text as a CSV file has them.
    """
    found = []
    for (length, share), part in _grouped([row for row in rows if row["recall"] != ""], "length", "share").items():
        by_policy = {policy: _by_slide(members) for (policy,), members in _grouped(part, "policy").items()}
        probe = _mean([_number(row, "recall") for row in by_policy.get("linear probe", {}).values()])
        for policy, of_slide in by_policy.items():
            recall = [_number(row, "recall") for row in of_slide.values()]
            row = {"length": length, "share": share, "policy": policy, "slides": len(of_slide)}
            row |= {"num_patches": round(_mean([_number(one, "num_patches") for one in of_slide.values()]))}
            row |= {"num_tumour": round(_mean([_number(one, "num_tumour") for one in of_slide.values()]), 1)}
            row |= named("recall", mean_interval(recall))
            row |= named("precision", mean_interval([_number(one, "precision") for one in of_slide.values()]))
            row |= named("found", mean_interval([_number(one, "kept_tumour") > 0 for one in of_slide.values()]))
            row["recall_of_probe"] = rounded(_mean(recall) / probe) if probe > 0 else ""
            row["p"] = _p_against_learned(of_slide, by_policy, "recall") if policy != LEARNED else ""
            found.append(row)
    return with_holm(found)


def answer_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Accuracy by kind of question, length, share and policy, with exact 95 % intervals where each slide has one.

    A row of a share is about the slides of that share and all clean ones of the same length (as many, in pooled
    slides); a row of "any" about all slides of the length. `accuracy` is of the likeliest answer, `written_accuracy` of
    the text that was written, `parsed` the share of texts that name an option. `sensitivity` and `specificity` are the
    accuracies of the written answer on slides with and without tumour. `p`: McNemar's test of the written answers
    against the learned policy's; `p_holm`: corrected for all rows of the table.

    Args:
        rows: as `TissueStudy.answers`.
    """
    found = []
    for (kind, length), part in _grouped(rows, "kind", "length").items():
        by_share = _grouped(part, "share")
        clean = {policy: members for (policy,), members in _grouped(by_share.get(("0.0",), []), "policy").items()}
        shares = {share: members for (share,), members in by_share.items() if share != "0.0"}
        if len(by_share) > 1:
            shares[ANY] = part
        for share, members in shares.items():
            of_policy = {policy: _by_slide(answers) for (policy,), answers in _grouped(members, "policy").items()}
            if share != ANY:
                for policy, answers in of_policy.items():
                    answers |= _by_slide(clean.get(policy, []))
            for policy, answers in of_policy.items():
                row = {"kind": kind, "length": length, "share": share, "policy": policy}
                row |= _accuracies(list(answers.values()))
                row["p"] = _p_against_learned(answers, of_policy, "written_correct") if policy != LEARNED else ""
                found.append(row)
    return with_holm(found)


def calibration_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean confidence, accuracy, expected calibration error (10 bins) and Brier score by kind and policy, over all
    slides. The confidence is the probability of the likeliest answer among those that were offered."""
    found = []
    for (kind, policy), part in _grouped(rows, "kind", "policy").items():
        confidence, correct, brier = (
            [_number(row, name) for row in part] for name in ("confidence", "correct", "brier")
        )
        error = expected_calibration_error(confidence, correct)
        found.append(
            {"kind": kind, "policy": policy, "questions": len(part), "accuracy": rounded(_mean(correct))}
            | {"confidence": rounded(_mean(confidence)), "ece": rounded(error), "brier": rounded(_mean(brier))}
        )
    return found


def reliability_table(rows: Sequence[Row], policy: str = LEARNED) -> list[dict[str, Any]]:
    """Confidence against accuracy in ten bins, by kind, of one policy; empty bins are left out."""
    found = []
    for (kind,), part in _grouped([row for row in rows if row["policy"] == policy], "kind").items():
        confidence, correct = ([_number(row, name) for row in part] for name in ("confidence", "correct"))
        for one in calibration_bins(confidence, correct):
            if one.answers:
                found.append(
                    {"kind": kind, "policy": policy, "low": one.low, "high": one.high, "answers": one.answers}
                    | {"confidence": rounded(one.confidence), "accuracy": rounded(one.accuracy)}
                )
    return found


def _accuracies(answers: Sequence[Row]) -> dict[str, Any]:
    correct, written = ([_number(one, name) for one in answers] for name in ("correct", "written_correct"))
    has_tumour = [_number(one, "num_tumour") > 0 for one in answers]
    sides = {
        name: [right for right, has in zip(written, has_tumour, strict=True) if has == wanted]
        for name, wanted in (("sensitivity", True), ("specificity", False))
    }
    row: dict[str, Any] = {"questions": len(answers)}
    row |= named("accuracy", mean_interval(correct))
    row |= named("written_accuracy", mean_interval(written))
    row["parsed"] = rounded(_mean([_number(one, "parsed") for one in answers]))
    return row | {name: rounded(_mean(values)) if values else "" for name, values in sides.items()}


def _p_against_learned(of_slide: Mapping[Any, Row], by_policy: Mapping[str, Mapping[Any, Row]], name: str) -> Any:
    learned = by_policy.get(LEARNED, {})
    shared = [slide for slide in of_slide if slide in learned]
    if not shared:
        return ""
    own, others = ([_number(of[slide], name) for slide in shared] for of in (of_slide, learned))
    return paired_p(own, others)


def with_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `p_holm` beside `p`, corrected for all of them; "" where a row has no p."""
    tested = [row for row in rows if row["p"] != ""]
    for row in rows:
        row["p_holm"] = ""
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p"], row["p_holm"] = significant(row["p"]), significant(corrected)
    return rows


def _grouped(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """By the text of some columns, in the order of the rows."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(str(row[name]) for name in names)].append(row)
    return dict(found)


def _by_slide(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    return {tuple(str(row[name]) for name in ("fold", "seed", "slide")): row for row in rows}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _number(row: Row, name: str) -> float:
    return float(row[name])


def named(name: str, interval: Interval) -> dict[str, float]:
    """An interval as three columns."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), map(rounded, interval), strict=True))
