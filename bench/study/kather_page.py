"""Writes the tables of the study of eight tissues into its page, between the `<!-- kather:NAME -->` marks.

    python -m bench.study.kather_page

All numbers come from the CSV files in `bench/results/kather/`.
"""

from __future__ import annotations

from collections import defaultdict

from bench.common.record import RESULTS
from bench.common.tables import interval, read_rows, table, write_tables

PAGE = RESULTS / "kather" / "README.md"
NAMES = {"mmr of learned": "learned, made diverse (MMR)"}
SHOWN = (
    "learned", "mmr of learned", "linear probe", "k-means", "farthest-point", "uniform", "random", "top-norm", "oracle",
    "all patches", "no slide",
)  # fmt: skip
Row = dict[str, str]


def main() -> None:
    tables = {"policies": policies(), "slides": slides(), "tissues": tissues()}
    write_tables(PAGE, {f"kather:{name}": made for name, made in tables.items()})


def policies() -> str:
    """Written answers to the eight questions, over all slides that were left out."""
    of_policy = {row["policy"]: row for row in rows_of("class_table") if is_whole(row)}
    lines = []
    for policy in SHOWN:
        row = of_policy[policy]
        covered = f"{float(row['covered']):.2f}" if row["covered"] else "-"
        right = interval(row, "written_accuracy", "written_accuracy_low", "written_accuracy_high")
        p = f"{row['p']} ({row['p_holm']})" if row["p"] else "-"
        lines.append([NAMES.get(policy, policy), right, f"{float(row['all_right']):.2f}", covered, p])
    return table(["shown", "right answers", "all eight right", "covered", "p (corrected)"], lines)


def slides() -> str:
    """Written answers right by the slide that was left out: a checkpoint for each."""
    right: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in rows_of("class_answers"):
        if row["kind"] == "tissue_presence":
            right[row["policy"], row["left_out"]].append(int(row["written_correct"]))
    left_out = sorted({slide for _, slide in right})
    lines = []
    for policy in SHOWN:
        cells = [right[policy, slide] for slide in left_out]
        lines.append([NAMES.get(policy, policy), *(f"{sum(cell)} of {len(cell)}" for cell in cells)])
    return table(["shown", *(f"slide {slide}" for slide in left_out)], lines)


def tissues() -> str:
    """Written answers right by tissue; in parentheses how often one of its tiles was kept where there were any."""
    cells = {(row["tissue"], row["policy"]): row for row in rows_of("class_table") if row["kind"] == "tissue_presence"}
    shown = [policy for policy in SHOWN if policy not in ("all patches", "uniform")]
    lines = []
    for tissue in dict.fromkeys(tissue for tissue, _ in cells if tissue != "any"):
        line = [tissue]
        for policy in shown:
            row = cells[tissue, policy]
            covered = f" ({float(row['covered']):.2f})" if row["covered"] else ""
            line.append(f"{float(row['written_accuracy']):.2f}{covered}")
        lines.append(line)
    return table(["tissue", *(NAMES.get(policy, policy) for policy in shown)], lines)


def is_whole(row: Row) -> bool:
    return (row["kind"], row["tissue"]) == ("tissue_presence", "any")


def rows_of(name: str) -> list[Row]:
    return read_rows(RESULTS / "kather" / f"{name}.csv")


if __name__ == "__main__":
    main()
