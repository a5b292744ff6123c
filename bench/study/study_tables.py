"""Writes the study's tables into its page, between the `<!-- study:NAME -->` marks.

    python -m bench.study.study_tables

All numbers come from the CSV files in `bench/results/study/`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

from bench.common.record import RESULTS
from bench.common.tables import table, write_tables

PAGE = RESULTS / "study" / "README.md"
POLICIES = {
    "learned": "learned",
    "mmr of learned": "learned, made diverse (MMR)",
    "oracle": "oracle: the key patches alone",
    "mmr": "norm, made diverse (MMR)",
    "farthest-point": "farthest-point",
    "k-means": "k-means",
    "uniform": "uniform",
    "random": "random",
    "top-norm": "top-norm",
    "blind": "no slide",
    "always": "constant letter",
}
Row = dict[str, str]


def main() -> None:
    tables = {"policies": policies(), "ablations": ablations(), "recipe_seeds": recipe_seeds()}
    write_tables(PAGE, {f"study:{name}": table for name, table in tables.items()})


def policies() -> str:
    """At the checkpoint's own positions."""
    rows = rows_of("policies")
    lengths = dict.fromkeys(row["length"] for row in rows)
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["positions"] == "original":
            kept = f" ({float(row['key_patch_recall']):.2f})" if row["key_patch_recall"] else ""
            interval = f"{float(row['accuracy']):.2f} [{float(row['low']):.2f}, {float(row['high']):.2f}]"
            policy = "always" if row["policy"].startswith("always") else row["policy"]  # "always A"
            cells[policy, row["length"]] = interval + kept
    return table(
        ["selection", *(f"{int(n):,}" for n in lengths)],
        ([shown, *(cells[policy, n] for n in lengths)] for policy, shown in POLICIES.items()),
    )


def ablations() -> str:
    rows = rows_of("ablations")
    arms, lengths = (dict.fromkeys(row[name] for row in rows) for name in ("arm", "length"))
    longest = list(lengths)[-1]
    lines = []
    for arm in arms:
        at = {n: [row for row in rows if (row["arm"], row["length"]) == (arm, n)] for n in lengths}
        soft = [row for found in at.values() for row in found if row["soft_accuracy"]]
        of_all = [*(spread(at[n], "accuracy") for n in lengths), spread(at[longest], "key_patch_recall")]
        lines.append([arm, *of_all, *(spread(soft, name) for name in ("soft_accuracy", "hard_accuracy_of_the_same"))])
    kept, same = f"key patches kept at {int(longest):,}", "hard, same questions"
    return table(["arm", *(f"N = {int(n):,}" for n in lengths), kept, "soft, N = 1,000", same], lines)


def recipe_seeds() -> str:
    rows = rows_of("recipe_seeds")
    columns = dict.fromkeys((row["length"], row["positions"]) for row in rows)
    lines = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        found = {(row["length"], row["positions"]): row for row in rows if row["seed"] == seed}
        lines.append(
            [seed]
            + [f"{float(found[c]['accuracy']):.2f} / {float(found[c]['oracle_accuracy']):.2f}" for c in columns]
            + [f"{float(found[n, 'original']['key_patch_recall']):.2f}" for n in dict.fromkeys(n for n, _ in columns)]
        )
    shown = [f"N = {int(n):,}, {mode}" for n, mode in columns]
    return table(
        ["seed", *shown, *(f"key patches kept, {int(n):,}" for n in dict.fromkeys(n for n, _ in columns))], lines
    )


def spread(rows: Sequence[Row], column: str) -> str:
    """mean (least - most)"""
    values = [float(row[column]) for row in rows]
    return f"{sum(values) / len(values):.3f} ({min(values):.2f} - {max(values):.2f})"


def rows_of(name: str) -> list[Row]:
    with open(RESULTS / "study" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
