"""The summary of an evaluation, from its results files alone: its numbers, and the files that show them."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vllm_wsi.errors import SettingsError, SetupError
from vllm_wsi.files import write_atomically, write_csv
from vllm_wsi.questions.length_bins import LENGTH_BINS, length_bin
from vllm_wsi.stats import holm, mean_interval, paired_interval, paired_p

from .report_figure import draw_lengths
from .report_page import page
from .report_trust import trust_measures
from .results import Row, read_results
from .runner import MAIN, Arm, Evaluation

Runs = dict[tuple[str, str], Sequence[Row]]
"""(mode, arm) -> rows."""


class Report(NamedTuple):
    """What `report` has to say."""

    lines: list[str]  # for the user
    num_errors: int  # questions that got no answer


def report(evaluation: Evaluation, others: Sequence[Path] = ()) -> Report:
    """Writes the summary of what was answered so far into the folder of results.

    Args:
        others: as in `summarise`.

    Raises:
        SettingsError: as in `summarise`.
    """
    summary = summarise(evaluation, others)
    files = write_summary(evaluation.settings.out, summary)
    lines, num_errors = [], 0
    for row in summary["table"]:
        if row["by"] == "all" and row["asked"]:
            num_errors += row["errors"]
            interval = f"{100 * row['accuracy']:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            lines.append(
                f"{row['mode']} {row['arm']} ({row['part']}): {row['correct']} of {row['asked']} right, {interval}; "
                f"{row['unparsed']} unparsed, {row['errors']} errors"
            )
    if missing := summary["missing_slides"]:
        lines.append(
            f"{summary['missing_questions']} questions not asked: {len(missing)} slides without usable features, "
            f"such as {missing[0]} (see summary.json)"
        )
    lines.append(f"see {', '.join(str(file) for file in files)}")
    if num_errors:
        lines.append(f"{num_errors} questions got no answer and count as wrong; the same command asks them again")
    return Report(lines, num_errors)


def summarise(evaluation: Evaluation, others: Sequence[Path] = ()) -> dict[str, Any]:
    """Everything that the results files say, with baselines and comparisons.

    Args:
        others: folders of earlier evaluations of the same question file, with which ours is compared.

    Raises:
        SettingsError: there are no results, or another folder has none of the same question file.
    """
    settings = evaluation.settings
    runs, header = _read_runs(evaluation)
    comparisons: list[dict[str, Any]] = []
    for mode in settings.modes:
        main = runs.get((mode, MAIN))
        if main is None:
            continue
        if "constant" in settings.baselines and any(row.options and row.status != "missing" for row in main):
            label, rows = constant_rows(main)
            runs[mode, f"constant {label}"] = rows
        against = [(name, rows) for (of_mode, name), rows in runs.items() if of_mode == mode and name != MAIN]
        against += [(str(other), _main_rows(other, mode, header)) for other in others]
        for name, other_rows in against:
            if gap := compare(main, other_rows, settings.seed):
                comparisons.append({"mode": mode, "first": MAIN, "second": name, **gap})
    for one, corrected in zip(comparisons, holm([one["p"] for one in comparisons]), strict=True):
        one["p_holm"] = corrected
    missing = [row for row in next(iter(runs.values())) if row.status == "missing"]
    return {
        "run": {name: value for name, value in header.items() if name not in ("mode", "arm")},
        "encoders": sorted({row.encoder for rows in runs.values() for row in rows if row.encoder}),
        "skipped": evaluation.num_skipped,
        "skipped_slides": sorted(settings.skip_slides),
        "missing_questions": len(missing),
        "missing_slides": list(dict.fromkeys(row.slide for row in missing)),
        "missing_reasons": {row.slide: row.error for row in missing},
        "table": table(runs, settings.seed),
        "comparisons": comparisons,
    }


def write_summary(out: Path, summary: Mapping[str, Any]) -> list[Path]:
    """Writes summary.json, table.csv, summary.md and lengths.png (where matplotlib is installed); returns the paths."""
    files = [out / "summary.json", out / "table.csv", out / "summary.md"]
    write_atomically(files[0], (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    write_csv(files[1], summary["table"])
    write_atomically(files[2], page(summary).encode())
    lengths = [row for row in summary["table"] if row["by"] == "patches" and row["part"] == "closed" and row["asked"]]
    if lengths:
        with contextlib.suppress(SetupError):  # without matplotlib: the table has the same numbers
            files.append(draw_lengths(out / "lengths.png", lengths))
    return files


def constant_rows(rows: Iterable[Row]) -> tuple[str, list[Row]]:
    """(the label that is right most often, the rows of answering it to every closed question that was asked)."""
    closed = [row for row in rows if row.options and row.status != "missing"]
    counts = Counter(row.gold for row in closed)
    label = max(sorted(counts), key=lambda one: counts[one])
    answer: dict[str, Any] = {"status": "answered", "label": label, "rule": "constant", "output": label}
    unset: dict[str, Any] = {"other": {}, "logprobs": None, "error": None}
    unset |= {"confidence": None, "sufficiency": None, "in_distribution": None}
    return label, [replace(row, correct=row.gold == label, **answer, **unset) for row in closed]


def measure(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Counts and shares of some questions.

    - `accuracy`, with the ends `low` and `high` of its 95 % interval over slides: the right answers among all questions
      that were asked. An answer that names no option, and a question without an answer, count as wrong.
    - `accuracy_of_parsed` leaves those two out; `accuracy_of_all` counts questions without features as wrong, too.
    - `balanced_accuracy`: the mean of the accuracies of each gold label.
    - `chance`: of a guess among the options.
    - The further measures of `Row.other`: means over the answered questions that have them.

    Where no question was asked there are counts alone.
    """
    asked = [row for row in rows if row.status != "missing"]
    counts = {
        "questions": len(rows),
        "missing": len(rows) - len(asked),
        "asked": len(asked),
        "correct": sum(row.correct for row in asked),
        "unparsed": sum(row.status == "answered" and bool(row.options) and row.label is None for row in asked),
        "errors": sum(row.status == "error" for row in asked),
    }
    if not asked:
        return counts
    interval = mean_interval([row.correct for row in asked], [row.slide for row in asked], seed=seed)
    parsed = counts["asked"] - counts["unparsed"] - counts["errors"]
    by_gold = defaultdict(list)
    for row in asked:
        by_gold[row.gold].append(row.correct)
    shares = {
        "accuracy": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "accuracy_of_parsed": counts["correct"] / parsed if parsed else None,
        "accuracy_of_all": counts["correct"] / len(rows),
        "balanced_accuracy": float(np.mean([np.mean(one) for one in by_gold.values()])),
        "chance": float(np.mean([1 / row.options if row.options else 0.0 for row in asked])),
    }
    for name in sorted({name for row in asked for name in row.other}):
        shares[name] = float(np.mean([row.other[name] for row in asked if name in row.other]))
    return {**counts, **shares}


def table(runs: Runs, seed: int) -> list[dict[str, Any]]:
    """A row for each run, part (closed, open) and group: all questions, each category, each bin of slide length.

    The rows of all closed questions hold `trust_measures` too.
    """
    lines = []
    for (mode, arm), rows in runs.items():
        parts = {"closed": [row for row in rows if row.options], "open": [row for row in rows if not row.options]}
        for part, members in parts.items():
            for (by, group), of_group in _groups(members).items():
                line = {"mode": mode, "arm": arm, "part": part, "by": by, "group": group}
                trust = trust_measures(of_group) if (part, by) == ("closed", "all") else {}
                lines.append({**line, **measure(of_group, seed), **trust})
    return lines


def compare(first: Sequence[Row], second: Sequence[Row], seed: int) -> dict[str, Any] | None:
    """First against second on the closed questions that both were asked; None where there is none.

    `p` is of the paired test over slides; where every slide has one question, that is the exact McNemar test.
    """
    others = {row.key: row for row in second if row.options and row.status != "missing"}
    pairs = [(row, others[row.key]) for row in first if row.options and row.status != "missing" and row.key in others]
    if not pairs:
        return None
    a, b = [one.correct for one, _ in pairs], [two.correct for _, two in pairs]
    slides = [one.slide for one, _ in pairs]
    gap = paired_interval(a, b, slides, seed=seed)
    return {
        "questions": len(pairs),
        "only_first": sum(x and not y for x, y in zip(a, b, strict=True)),
        "only_second": sum(y and not x for x, y in zip(a, b, strict=True)),
        "difference": gap.estimate,
        "low": gap.low,
        "high": gap.high,
        "p": paired_p(a, b, slides, seed),
    }


def _read_runs(evaluation: Evaluation) -> tuple[Runs, Mapping[str, Any]]:
    """(the rows of this evaluation's questions, the settings of the first results file)."""
    out = evaluation.settings.out
    runs: Runs = {}
    header: Mapping[str, Any] | None = None
    for arm in evaluation.arms:
        path = out / arm.file_name
        if not path.is_file():
            continue
        run, found = read_results(path)
        header = header or run
        chosen = [found[one.key] for one in evaluation.questions_in(arm.mode) if one.key in found]
        if chosen:
            runs[arm.mode, arm.arm] = chosen
    if header is None or not runs:
        raise SettingsError(f"{out}: found no results, wanted those of a run")
    return runs, header


def _main_rows(folder: Path, mode: str, header: Mapping[str, Any]) -> Sequence[Row]:
    """The main arm of another evaluation."""
    path = folder / Arm("choice" if mode == "choice" else "generate", MAIN).file_name
    if not path.is_file():
        raise SettingsError(f"{path}: found no such results, wanted a run to compare with")
    run, rows = read_results(path)
    if run.get("data_sha256") != header["data_sha256"]:
        raise SettingsError(f"{path}: found results of another question file, wanted {header['data']}")
    return list(rows.values())


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(name of the grouping, group) -> rows; bins of length stand last, the shortest first."""
    groups: dict[tuple[str, str], list[Row]] = {("all", "all"): list(rows)} if rows else {}
    for row in rows:
        for by, group in row.categories.items():
            if by != "Part":  # closed and open have tables of their own
                groups.setdefault((by, group), []).append(row)
    by_length = defaultdict(list)
    for row in rows:
        if row.num_patches is not None:
            by_length[length_bin(row.num_patches)].append(row)
    return groups | {("patches", name): by_length[name] for name in LENGTH_BINS if name in by_length}
