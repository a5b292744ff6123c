"""Writes the study's tables into its page, between the `<!-- study:NAME -->` marks.

    python -m bench.study.study_tables

All numbers come from the CSV files in `bench/results/study/`.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.common.record import RESULTS
from bench.common.tables import interval, read_rows, table, write_tables
from vllm_wsi.stats import p_text

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
    tables = {
        "policies": policies(),
        "policies_tests": policies_tests(),
        "hardness": hardness(),
        "ablations": ablations(),
        "ablation_tests": ablation_tests_table(),
        "recipe_seeds": recipe_seeds(),
    }
    write_tables(PAGE, {f"study:{name}": table for name, table in tables.items()})


def policies() -> str:
    """At the checkpoint's own positions."""
    rows = rows_of("policies")
    lengths = dict.fromkeys(row["length"] for row in rows)
    cells: dict[tuple[str, str], str] = {}
    for row in rows:
        if row["positions"] == "original":
            cells[policy_of(row), row["length"]] = accuracy_and_kept(row)
    return table(
        ["selection", *(f"{int(n):,}" for n in lengths)],
        ([shown, *(cells[policy, n] for n in lengths)] for policy, shown in POLICIES.items()),
    )


def policies_tests() -> str:
    """Each policy against the learned one, at the checkpoint's own positions."""
    rows = [row for row in rows_of("policies") if row["positions"] == "original" and row["p"]]
    lengths = dict.fromkeys(row["length"] for row in rows)
    names = ("minus_learned", "minus_learned_low", "minus_learned_high")
    cells = {
        (policy_of(row), row["length"]): f"{interval(row, *names)}; {p_and_corrected(row, 'p', 'p_holm')}"
        for row in rows
    }
    return table(
        ["selection, less the learned", *(f"{int(n):,}" for n in lengths)],
        ([shown, *(cells[policy, n] for n in lengths)] for policy, shown in POLICIES.items() if policy != "learned"),
    )


def hardness() -> str:
    """Right answers, and in parentheses the share of the key patches kept, for each knob."""
    rows = rows_of("hardness")
    cells = {(row["knob"], row["policy"]): accuracy_and_kept(row) for row in rows}
    shown = ("learned", "oracle", "bayes", "farthest-point", "random")
    lines = [[knob, *(cells[knob, policy] for policy in shown)] for knob in dict.fromkeys(row["knob"] for row in rows)]
    return table(["knob", *("Bayes limit" if policy == "bayes" else policy for policy in shown)], lines)


def ablations() -> str:
    """Means over seeds; leakage where the rows have it."""
    rows = rows_of("ablations")
    arms, lengths = (dict.fromkeys(row[name] for row in rows) for name in ("arm", "length"))
    longest, lines = list(lengths)[-1], []
    of_soft = ["soft_accuracy", "hard_accuracy_of_the_same"] + ["soft_mass_on_hard"] * ("soft_mass_on_hard" in rows[0])
    for arm in arms:
        at = {n: [row for row in rows if (row["arm"], row["length"]) == (arm, n)] for n in lengths}
        soft = [row for found in at.values() for row in found if row["soft_accuracy"]]
        tuned = " (schedules tuned for it)" if soft[0]["schedules"] == "tuned for this arm" else ""
        line = [arm + tuned, *(spread(at[n], "accuracy") for n in lengths), spread(at[longest], "key_patch_recall")]
        line += [spread(soft, name) for name in of_soft]
        if "leakage_mean" in rows[0]:
            for name in ("leakage", "leakage_rescored"):
                mean = sum(float(row[f"{name}_mean"]) for row in soft) / len(soft)
                line.append(f"{mean:.2g} / {max(float(row[f'{name}_max']) for row in soft):.2g}")
        lines.append(line)
    head = ["arm", *(f"N = {int(n):,}" for n in lengths), f"key patches kept at {int(longest):,}"]
    head += ["soft, N = 1,000", "hard, same questions", "soft mass on hard"][: len(of_soft)]
    if "leakage_mean" in rows[0]:
        head += ["leakage by the denoiser, mean / most", "by the scores too"]
    return table(head, lines)


def ablation_tests_table() -> str:
    """Each arm less the paper's; the tests over slides where they were made."""
    rows = rows_of("ablation_tests")
    cells = {(row["arm"], row["length"], row["measure"]): row for row in rows}
    lines = []
    for arm, length in dict.fromkeys((row["arm"], row["length"]) for row in rows):
        line = [arm, f"{int(length):,}"]
        for measure in ("accuracy", "key_patch_recall"):
            row = cells[arm, length, measure]
            mean, least, most = (
                f"{float(row[name]):.3f}" for name in ("difference", "least_of_seeds", "most_of_seeds")
            )
            line.append(f"{mean} ({least} to {most})")
            line.append(p_and_corrected(row, "seeds_p", "seeds_p_holm"))
            if row["slides_p"]:
                line[-2] += f"; {interval(row, 'difference', 'low', 'high')}"
                line[-1] += f"; {p_and_corrected(row, 'slides_p', 'slides_p_holm')}"
        lines.append(line)
    return table(["arm, less the first of the table above", "N", "accuracy", "p", "key patches kept", "p"], lines)


def accuracy_and_kept(row: Row) -> str:
    """accuracy [low, high] (share of the key patches kept, where it is known)"""
    kept = f" ({float(row['key_patch_recall']):.2f})" if row["key_patch_recall"] else ""
    return interval(row, "accuracy", "low", "high") + kept


def p_and_corrected(row: Row, name: str, corrected: str) -> str:
    """p (p corrected)"""
    return f"{p_text(float(row[name]))} ({p_text(float(row[corrected]))})"


def policy_of(row: Row) -> str:
    return "always" if row["policy"].startswith("always") else row["policy"]  # "always A"


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
    return read_rows(RESULTS / "study" / f"{name}.csv")


if __name__ == "__main__":
    main()
