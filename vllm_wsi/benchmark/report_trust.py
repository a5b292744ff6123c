"""How far the answers of a run can be trusted: confidence against right and wrong, and risk against coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_wsi.confidence import calibration_error, risk_coverage

from .results import Row

COVERAGES = (80, 50)
"""Shares of the answers, in %, whose risk is told: those that are trusted most."""


def trust_measures(rows: Sequence[Row]) -> dict[str, Any]:
    """Measures of some questions of one run; of those rows alone that are closed and were asked.

    By confidence, where any row has one. A question without an answer, or whose answer names no option, counts as wrong
    with confidence 0; an answer whose confidence is not known (found by structured outputs, say) is left out.

    - `confidence_answers`: how many count.
    - `calibration_error`: of the confidence, as `confidence.calibration_error`.
    - `confidence_aurc`, `confidence_risk_80`, `confidence_risk_50`: the area under the risk-coverage curve, and the
      share of wrong answers among the 80 and the 50 % of highest confidence.

    By sufficiency, where any row has one, the same under `sufficiency_..`. It is said of the slide: an answer that
    names no option keeps it and counts as wrong; a question without an answer has sufficiency 0. It has no calibration
    error: it is no probability that the answer is right.

    - `slides_told`: slides of which `in_distribution` is known.
    - `slides_unlike`: of those, how many were called unlike those of validation.
    """
    asked = [row for row in rows if row.options and row.status != "missing"]
    by_confidence = [(row.correct, value) for row in asked if (value := _confidence(row)) is not None]
    by_sufficiency = [(row.correct, value) for row in asked if (value := _sufficiency(row)) is not None]
    measures: dict[str, Any] = {}
    if any(row.confidence is not None for row in asked):
        correct, trust = zip(*by_confidence, strict=True)
        curve = _curve("confidence", correct, trust)
        measures |= {"calibration_error": calibration_error(correct, trust), **curve}
    if any(row.sufficiency is not None for row in asked):
        measures |= _curve("sufficiency", *zip(*by_sufficiency, strict=True))
    return measures | _unlike(asked)


def trust_section(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of summary.md; none where nothing is known.

    Args:
        table: of the summary, whose lines of all closed questions hold `trust_measures`.
    """
    lines = [
        f"| {row['mode']} | {row['arm']} | {by} | {row[f'{by}_answers']} | {_percent(row[f'{by}_aurc'])} | "
        + " | ".join(_percent(row[f"{by}_risk_{coverage}"]) for coverage in COVERAGES)
        + f" | {_percent(row['calibration_error']) if by == 'confidence' else ''} |"
        for row in table
        for by in ("confidence", "sufficiency")
        if f"{by}_answers" in row
    ]
    if not lines:
        return []
    risks = " | ".join(f"risk at {coverage} %" for coverage in COVERAGES)
    text = [
        "## How far the answers can be trusted",
        "",
        "Confidence: the probability of the named option among the options. Sufficiency: what the checkpoint's "
        "calibration says of the slide, the probability that it shows what is asked for. Risk at 80 %: the share of "
        "wrong answers among the 80 % that are trusted most by that number. AURC: the mean risk over all such "
        "percentages, the area under the risk-coverage curve. Calibration error: how far confidence lies from the "
        "share of right answers, on average over ten equal parts of the answers. Of all four, less is better; all are "
        "in %. A question without an answer, or whose answer names no option, counts as wrong with confidence 0.",
        "",
        f"| mode | run | trusted by | answers | AURC | {risks} | calibration error |",
        "|---|---|---|--:|--:|" + "--:|" * (len(COVERAGES) + 1),
        *lines,
        "",
    ]
    for row in table:
        if row.get("slides_told"):
            text += [
                f"{row['mode']} {row['arm']}: {row['slides_unlike']} of {row['slides_told']} slides are unlike those "
                "of validation, on which the checkpoint was checked.",
                "",
            ]
    return text


def _confidence(row: Row) -> float | None:
    return 0.0 if row.status == "error" or row.label is None else row.confidence


def _sufficiency(row: Row) -> float | None:
    return 0.0 if row.status == "error" else row.sufficiency


def _curve(name: str, correct: Sequence[bool], trust: Sequence[float]) -> dict[str, Any]:
    curve = risk_coverage(correct, trust)
    risks = {f"{name}_risk_{coverage}": curve.risk_at(coverage / 100) for coverage in COVERAGES}
    return {f"{name}_answers": len(correct), f"{name}_aurc": curve.area, **risks}


def _unlike(rows: Sequence[Row]) -> dict[str, int]:
    told = [row for row in rows if row.in_distribution is not None]
    if not told:
        return {}
    from vllm_wsi.selection.calibration import USUAL  # imports torch, which a report without these needs not

    unlike = {row.slide for row in told if row.in_distribution is not None and row.in_distribution < USUAL}
    return {"slides_told": len({row.slide for row in told}), "slides_unlike": len(unlike)}


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
