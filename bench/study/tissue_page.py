"""Writes the tables of the study of real tissue into its page, between the `<!-- tissue:NAME -->` marks.

    python -m bench.study.tissue_page

All numbers come from the CSV files in `bench/results/tissue/`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.common.record import RESULTS
from bench.common.tables import interval, read_rows, table, write_tables
from vllm_wsi.study.tissue_measures import auc

PAGE = RESULTS / "tissue" / "README.md"
LENGTHS = ("256", "1024", "4096")
POLICIES = ("learned", "linear probe", "k-means", "farthest-point", "uniform", "random", "top-norm", "oracle")
SHOWN = (*POLICIES, "all patches", "no slide")
Row = dict[str, str]


def main() -> None:
    tables = {
        "scores": scores(),
        **{f"kept-{length}": kept(length) for length in LENGTHS},
        **{f"{kind}-{length}": answers(kind, length) for kind in ("presence", "share_sentence") for length in LENGTHS},
        "separation": separation(),
        "elsewhere": elsewhere(),
        "calibration": calibration(),
        "steps": steps(),
    }
    write_tables(PAGE, {f"tissue:{name}": table for name, table in tables.items()})


def scores() -> str:
    """AUC of all patches and tumour among the best 32, for each fold."""
    lines = [
        [row["patches"], row["fold"], row["policy"], row["auc"], f"{float(row['precision']):.2f}"]
        for row in sorted(rows_of("scores"), key=lambda row: (row["patches"], row["fold"]))
    ]
    return table(["patches", "fold", "ranked by", "AUC", "tumour among the best 32"], lines)


def kept(length: str) -> str:
    """Share of tumour among the 32, by its share of the slide."""
    rows = [row for row in rows_of("selection_table") if row["length"] == length]
    shares = shares_of(rows)
    cells = {
        (row["policy"], row["share"]): interval(row, "precision", "precision_low", "precision_high") for row in rows
    }
    return table(
        ["the 32 of", *(f"{float(share):.0%}" for share in shares)],
        ([policy, *(cells[policy, share] for share in shares)] for policy in POLICIES),
    )


def answers(kind: str, length: str) -> str:
    """Written answers right, on clean slides and by the share of tumour; balanced: half clean, half with tumour."""
    rows = [row for row in rows_of("answers") if row["kind"] == kind and row["length"] == length]
    shares = list(dict.fromkeys(row["share"] for row in rows))
    lines = []
    for policy in SHOWN:
        line, balanced = [policy], []
        for share in shares:
            right = [int(row["written_correct"]) for row in rows if (row["policy"], row["share"]) == (policy, share)]
            line.append(f"{sum(right)} of {len(right)}" if right else "-")
            balanced += [sum(right) / len(right)] if right else []
        clean, *with_tumour = balanced or [0.0, 0.0]
        mean = (clean + sum(with_tumour) / len(with_tumour)) / 2
        lines.append([*line, f"{mean:.2f}" if balanced else "-"])
    heads = ["none" if not float(share) else f"{float(share):.0%}" for share in shares]
    return table(["shown", *heads, "balanced"], lines)


def separation() -> str:
    """How well the probability of «yes» tells slides with tumour from clean ones: AUC by length, mean of folds."""
    rows = [row for row in rows_of("answers") if row["kind"] == "presence" and row["length"] in LENGTHS]
    shares = [share for share in dict.fromkeys(row["share"] for row in rows) if float(share)]
    lines = []
    for policy in SHOWN:
        line = [policy]
        for length, share in ((length, share) for length in LENGTHS for share in shares):
            found = []
            for fold in dict.fromkeys(row["fold"] for row in rows):
                of_fold = [row for row in rows if (row["fold"], row["policy"], row["length"]) == (fold, policy, length)]
                judged = [row for row in of_fold if row["share"] == share or not float(row["share"])]
                said = np.array([p_yes(row) for row in judged])
                if len(said):
                    found.append(auc(said, np.array([float(row["share"]) > 0 for row in judged])))
            line.append(f"{sum(found) / len(found):.2f}" if found else "-")
        lines.append(line)
    heads = [f"{int(length):,}, {float(share):.0%}" for length in LENGTHS for share in shares]
    return table(["shown", *heads], lines)


def p_yes(row: Row) -> float:
    """The answer's probability of tumour."""
    confidence = float(row["confidence"])
    return confidence if row["likeliest"] == "yes" else 1 - confidence


def elsewhere() -> str:
    """Written answers right on natural slides and the near-whole slide."""
    rows = [row for row in rows_of("answer_table") if row["length"] in ("natural", "near-whole")]
    places = list(dict.fromkeys((row["kind"], row["length"]) for row in rows))
    cells = {
        (row["policy"], row["kind"], row["length"]): interval(
            row, "written_accuracy", "written_accuracy_low", "written_accuracy_high"
        )
        for row in rows
    }
    heads = [f"{length}, {kind.replace('_', ', ')} ({count_of(rows, kind, length)})" for kind, length in places]
    return table(["shown", *heads], ([policy, *(cells[policy, *place] for place in places)] for policy in SHOWN))


def calibration() -> str:
    lines = [
        [row["kind"].replace("_", ", "), row["policy"], row["questions"]]
        + [f"{float(row[name]):.2f}" for name in ("accuracy", "confidence", "ece", "brier")]
        for row in rows_of("calibration")
        if row["policy"] in ("learned", "linear probe", "oracle", "no slide")
    ]
    return table(["question", "shown", "questions", "accuracy", "confidence", "ECE", "Brier"], lines)


def steps() -> str:
    """Written answers from the learned 32 after 120 steps of the last stage and after 240, of all lengths together."""
    found: dict[tuple[str, str, str], dict[str, list[int]]] = {}
    for number, name in (("120", "answers"), ("240", "longer/answers")):
        for row in rows_of(name):
            if row["policy"] == "learned" and row["length"] in LENGTHS:
                cells = found.setdefault((row["kind"], row["fold"], number), {})
                cells.setdefault(row["share"], []).append(int(row["written_correct"]))
    shares = sorted({share for cells in found.values() for share in cells}, key=float)
    lines = [
        [kind.replace("_", ", "), fold, number, *(f"{sum(cells[one])} of {len(cells[one])}" for one in shares)]
        for (kind, fold, number), cells in sorted(found.items())
    ]
    return table(
        ["question", "fold", "steps", *(f"{float(one):.0%}" if float(one) else "none" for one in shares)], lines
    )


def shares_of(rows: Sequence[Row]) -> list[str]:
    return [share for share in dict.fromkeys(row["share"] for row in rows) if share not in ("", "any")]


def count_of(rows: Sequence[Row], kind: str, length: str) -> str:
    return next(row["questions"] for row in rows if (row["kind"], row["length"]) == (kind, length))


def rows_of(name: str) -> list[Row]:
    return read_rows(RESULTS / "tissue" / f"{name}.csv")


if __name__ == "__main__":
    main()
