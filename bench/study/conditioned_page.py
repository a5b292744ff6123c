"""Writes the tables of `docs/conditioned.md`, between its `<!-- conditioned:NAME -->` marks.

    python -m bench.study.conditioned_page

All numbers come from the CSV files in `bench/results/study/`.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from scipy.stats import t

from bench.common.record import RESULTS, ROOT
from bench.common.tables import interval, read_rows, table, write_tables

PAGE = ROOT / "docs" / "conditioned.md"
ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")
LESS_BEST = ("less_k_best", "less_low", "less_high")
SUMMARY_ARMS = {
    "none": "nothing: 32 best alone",
    "means of interleaved rows": "means of every S-th row",
    "nearest to means of interleaved rows": "the tile nearest to each mean of every S-th row",
    "nearest to k-means of equal size": "the tile nearest to each mean of equal pools",
    "evenly spaced": "evenly spaced tiles",
}
Row = dict[str, str]


def main() -> None:
    tables = {
        "topics": topics(), "tissue": tissue(), "trust": trust("trust"), "trust-tissue": trust("trust_tissue"),
        "trust-topics": trust_of_topics(), "summary-cost": summary_cost(), "tissue-summary": tissue_summary(),
        "tissue-summary-folds": tissue_summary_folds(),
    }  # fmt: skip
    write_tables(PAGE, {f"conditioned:{name}": made for name, made in tables.items()})


def topics() -> str:
    """A line for each arm, three columns for each length: over the worlds, each of a seed of its own."""
    cells: dict[tuple[str, str], dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in read_rows(RESULTS / "study" / "topic_scorers.csv"):
        fixed = row["arm"] in ("random", "oracle", "ideal, question-free")
        cells[row["arm"], "-" if fixed else row["steps"]][row["num_patches"]].setdefault(row["seed"], row)
    question = next(of_arm for (arm, _), of_arm in cells.items() if arm == "question")
    head = ["chosen by", "steps"]
    for n, of_seed in question.items():
        head += [f"N = {int(n):,}, {len(of_seed)} worlds: right", "the question more", "kept"]
    lines = []
    for (arm, steps), of_arm in cells.items():
        line = [arm, steps]
        for n, of_seed in of_arm.items():
            assert of_seed.keys() == question[n].keys(), (
                f"{arm}, {steps} steps, N = {n}: other seeds than the question's"
            )
            right = {seed: float(row["accuracy"]) for seed, row in of_seed.items()}
            more = [float(row["accuracy"]) - right[seed] for seed, row in question[n].items()]
            kept = np.mean([float(row["kept_at_least_one"]) for row in of_seed.values()])
            line += [_mean_range([*right.values()]), "-" if arm == "question" else _t_interval(more), f"{kept:.2f}"]
        lines.append(line)
    return table(head, lines)


def tissue() -> str:
    """A line for each arm and K: the mean over the slides that were left out, and each of them."""
    of_arm: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in read_rows(RESULTS / "study" / "tissue_scorers.csv"):
        of_arm[row["k"], row["arm"]].append(row)
    lines = []
    for (k, arm), rows in of_arm.items():
        each = "; ".join(f"{row['left_out']}: {interval(row, *ACCURACY)}" for row in rows)
        means = [np.mean([float(row[name]) for row in rows]) for name in ("accuracy", "asked_tiles_kept")]
        kept = np.mean([float(row["kept_at_least_one"]) for row in rows])
        lines.append([k, arm, f"{means[0]:.2f}", each, f"{means[1]:.2f}", f"{kept:.2f}"])
    return table(["K", "chosen by", "right", "by slide left out", "asked tiles kept", "at least one"], lines)


def trust(name: str) -> str:
    """A line for each world and length."""
    head = [
        "world", "N", "right", "confidence", "calibration error, T = 1", "calibration error", "AURC",
        "wrong of the surest 80 %", "sufficiency: AUROC", "enough, shown / lacking", "told unlike",
    ]  # fmt: skip
    lines = []
    for row in read_rows(RESULTS / "study" / f"{name}.csv"):
        enough = f"{_two(row, 'enough_of_shown')} / {_two(row, 'enough_of_lacking')}"
        shown = ("confidence", "calibration_error_t1", "calibration_error", "aurc", "risk_at_80", "sufficiency_auroc")
        numbers = [_two(row, one) for one in shown]
        right = interval(row, *ACCURACY)
        lines.append([row["world"], f"{int(row['num_patches']):,}", right, *numbers, enough, _two(row, "told_unlike")])
    return table(head, lines)


def trust_of_topics() -> str:
    """A line for each world and length: the mean over the seeds, and the least and the most of them."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in read_rows(RESULTS / "study" / "topic_trust.csv"):
        groups[row["world"], row["num_patches"]].append(row)
    shown = (
        "accuracy", "calibration_error_t1", "calibration_error", "aurc", "aurc_sufficiency", "sufficiency_auroc",
        "enough_of_shown", "enough_of_lacking", "told_unlike",
    )  # fmt: skip
    head = [
        "world", "N", "seeds", "right", "calibration error, T = 1", "calibration error", "AURC", "AURC by sufficiency",
        "sufficiency: AUROC", "enough of shown", "enough of lacking", "told unlike",
    ]  # fmt: skip
    lines = []
    for (world, n), rows in groups.items():
        columns = [[float(row[name]) for row in rows] for name in shown]
        lines.append([world, f"{int(n):,}", str(len(rows)), *map(_mean_range, columns)])
    return table(head, lines)


def summary_cost() -> str:
    """A line for each way to make the S means, a column for each width of the features; the newest rows."""
    newest: dict[str, dict[tuple[str, str], Row]] = defaultdict(dict)
    for row in read_rows(RESULTS / "study" / "summary_cost.csv"):
        newest[row["feature_dim"]][row["rest"], row["s"]] = row
    lines = [["the selection", *(_two(next(iter(rows.values())), "select_cpu_seconds") for rows in newest.values())]]
    for rest, s in dict.fromkeys(case for rows in newest.values() for case in rows):
        line = [f"{rest}, S = {s}"]
        for rows in newest.values():
            row = rows[rest, s]
            added = float(row["centres_cpu_seconds"]) + float(row["pass_cpu_seconds"])
            line.append(f"{added:.2f} ({_two(row, 'added_over_select')} of the selection)")
        lines.append(line)
    return table(["", *(f"d = {int(d):,}" for d in newest)], lines)


def tissue_summary() -> str:
    """A line for each test and arm, a column for each question: over all folds and seeds, and less 32 best alone."""
    rows = [row for row in read_rows(RESULTS / "study" / "tissue_summary.csv") if row["kind"] == "pooled"]
    questions = list(dict.fromkeys(row["question"] for row in rows))
    groups: dict[tuple[str, str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        groups[row["tested_on"], row["rest"], row["s"], row["seed"]][row["question"]] = row
    lines = []
    for (tested_on, rest, s, seeds), of_arm in groups.items():
        cells = []
        for row in (of_arm[question] for question in questions):
            less = f" ({_signed(row)})" if row["less_k_best"] else ""
            cells.append(interval(row, *ACCURACY) + less)
        lines.append([tested_on, SUMMARY_ARMS[rest], s, str(len(seeds.split())), *cells, _kept(of_arm["finding"])])
    return table(["tested on", "the S tokens", "S", "seeds", *questions, "finding: kept at least one"], lines)


def tissue_summary_folds() -> str:
    """The same for each fold, on its sources left out: the mean over seeds, and the least and the most of them."""
    rows = [row for row in read_rows(RESULTS / "study" / "tissue_summary.csv") if row["kind"] == "seed"]
    rows = [row for row in rows if row["tested_on"] == "left-out sources"]
    questions = list(dict.fromkeys(row["question"] for row in rows))
    groups: dict[tuple[str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["left_out"], row["rest"], row["s"]][row["question"]].append(float(row["accuracy"]))
    lines = [
        [
            left_out,
            SUMMARY_ARMS[rest],
            s,
            str(len(found[questions[0]])),
            *(_mean_range(found[one]) for one in questions),
        ]
        for (left_out, rest, s), found in groups.items()
    ]
    return table(["sources left out", "the S tokens", "S", "seeds", *questions], lines)


def _signed(row: Row) -> str:
    estimate, low, high = (f"{float(row[name]) + 0.0:+.2f}" for name in LESS_BEST)
    return f"{estimate} [{low}, {high}]"


def _t_interval(values: list[float]) -> str:
    """Of the mean, 95 %, by Student's t."""
    mean, half = np.mean(values), t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def _mean_range(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _kept(row: Row) -> str:
    return _two(row, "kept_at_least_one")


def _two(row: Row, name: str) -> str:
    return f"{float(row[name]):.2f}"


if __name__ == "__main__":
    main()
