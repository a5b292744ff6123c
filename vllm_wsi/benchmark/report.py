"""The summary of an evaluation: JSON, CSV, Markdown and a figure, from its results files alone."""

from __future__ import annotations

import contextlib
import csv
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_wsi.stats import bootstrap_mean, mcnemar, paired_bootstrap

from .results import Row

LENGTH_EDGES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Patches; the bins of the paper's figure."""

Runs = Mapping[tuple[str, str], Sequence[Row]]
"""(mode, arm) -> rows."""


def length_bin(num_patches: int) -> str:
    """The paper's bin of a slide: "<64", "64-128", ..., ">=4096"; the lower edge belongs to it."""
    place = int(np.searchsorted(LENGTH_EDGES, num_patches, side="right"))
    if place == 0:
        return f"<{LENGTH_EDGES[0]}"
    if place == len(LENGTH_EDGES):
        return f">={LENGTH_EDGES[-1]}"
    return f"{LENGTH_EDGES[place - 1]}-{LENGTH_EDGES[place]}"


def constant_rows(rows: Iterable[Row]) -> tuple[str, list[Row]]:
    """(label, rows) of the best constant answer: the label that is right most often, said to every question asked."""
    closed = [row for row in rows if row.options and row.status != "missing"]
    counts = Counter(row.gold for row in closed)
    label = max(sorted(counts), key=lambda one: counts[one])
    made = [
        Row(**{**vars(row), "status": "answered", "label": label, "rule": "constant", "correct": row.gold == label,
               "output": label, "other": {}, "logprobs": None, "error": None})
        for row in closed
    ]  # fmt: skip
    return label, made


def measure(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Counts and shares of some questions.

    `accuracy`, with its 95 % interval over slides: right ones among all that were asked; an answer that names no option
    and a question that the server did not answer count as wrong. `accuracy_of_parsed` leaves those out.
    `accuracy_of_all` counts questions without features as wrong, too. `balanced_accuracy`: mean over the gold labels.
    `chance`: a guess among the options. The other measures are means over the answered.
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
    right = [row.correct for row in asked]
    interval = bootstrap_mean(right, [row.slide for row in asked], seed)
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
    """A line for each run, part (closed, open), and group: "all", every category, every length bin."""
    lines = []
    for (mode, arm), rows in runs.items():
        for part, of_part in (("closed", [row for row in rows if row.options]),
                              ("open", [row for row in rows if not row.options])):  # fmt: skip
            for (by, group), members in _groups(of_part).items():
                line = {"mode": mode, "arm": arm, "part": part, "by": by, "group": group}
                lines.append({**line, **measure(members, seed)})
    return lines


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {("all", "all"): list(rows)} if rows else {}
    for row in rows:
        for by, group in row.categories.items():
            if by != "Part":
                groups.setdefault((by, group), []).append(row)
    lengths: dict[int, list[Row]] = {}
    for row in rows:
        if row.num_patches is not None:
            place = int(np.searchsorted(LENGTH_EDGES, row.num_patches, side="right"))
            lengths.setdefault(place, []).append(row)
    for _, members in sorted(lengths.items()):
        groups["patches", length_bin(members[0].num_patches or 0)] = members
    return groups


def compare(first: Sequence[Row], second: Sequence[Row], seed: int) -> dict[str, Any] | None:
    """First against second on the closed questions that both were asked; None without one."""
    others = {row.key: row for row in second if row.options and row.status != "missing"}
    pairs = [(row, others[row.key]) for row in first if row.options and row.status != "missing" and row.key in others]
    if not pairs:
        return None
    a, b = [one.correct for one, _ in pairs], [two.correct for _, two in pairs]
    gap = paired_bootstrap(a, b, [one.slide for one, _ in pairs], seed)
    return {
        "questions": len(pairs),
        "only_first": sum(x and not y for x, y in zip(a, b, strict=True)),
        "only_second": sum(y and not x for x, y in zip(a, b, strict=True)),
        "difference": gap.estimate,
        "low": gap.low,
        "high": gap.high,
        "mcnemar_p": mcnemar(a, b),
    }


def write_report(out: Path, summary: Mapping[str, Any]) -> list[Path]:
    """summary.json, table.csv, summary.md and lengths.png (where matplotlib is installed); returns what was written."""
    files = [out / "summary.json", out / "table.csv", out / "summary.md"]
    files[0].write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    lines = summary["table"]
    names = list(dict.fromkeys(name for line in lines for name in line))
    with open(files[1], "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
    files[2].write_text(markdown(summary))
    lengths = [line for line in lines if line["by"] == "patches" and line["part"] == "closed" and line["asked"]]
    if lengths:
        with contextlib.suppress(ImportError):  # the table has it all
            files.append(_draw_lengths(out / "lengths.png", lengths))
    return files


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as a page."""
    run = summary["run"]
    lines = [f"# {run['task']}: {run['model']}", ""]
    encoders = ", ".join(summary["encoders"]) or "not said by the feature files"
    versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items() if value)
    lines += [
        f"{run['data']} (sha256 {run['data_sha256'][:12]}), prompts {run['prompt_sha256'][:12]}, seed {run['seed']}, "
        f"greedy; {run['endpoint']}; encoder: {encoders}; {versions}.",
        "",
    ]
    if summary["skipped"]:
        lines += [f"{summary['skipped']} questions were left out on request.", ""]
    if summary["missing_slides"]:
        shown = ", ".join(summary["missing_slides"][:10])
        more = f" and {len(summary['missing_slides']) - 10} more" if len(summary["missing_slides"]) > 10 else ""
        lines += [f"{summary['missing_questions']} questions were not asked, as {len(summary['missing_slides'])} "
                  f"slides have no usable features: {shown}{more}.", ""]  # fmt: skip
    for part, name in (("closed", "Multiple choice"), ("open", "Open questions (words equal; F1 of words)")):
        rows = [line for line in summary["table"] if line["part"] == part and line["by"] == "all" and line["asked"]]
        if rows:
            extra = (
                "token_f1" if part == "open" else "nearest_choice" if run["task"] == "wsi-vqa" else "balanced_accuracy"
            )
            head = "| mode | run | asked | correct | accuracy, 95 % over slides | unparsed | errors | of parsed |"
            lines += [f"## {name}", "", f"{head} {extra.replace('_', ' ')} |", "|---|---|" + "--:|" * 7]
            lines += [
                f"| {line['mode']} | {line['arm']} | {line['asked']} | {line['correct']} | {_interval(line)} | "
                f"{line['unparsed']} | {line['errors']} | {_percent(line.get('accuracy_of_parsed'))} | "
                f"{_percent(line.get(extra))} |"
                for line in rows
            ]
            lines.append("")
    lines += _by_group(summary)
    if summary["comparisons"]:
        lines += ["## Against the others, on the same questions", "",
                  "| mode | run | against | questions | right alone | other alone | difference | McNemar p |",
                  "|---|---|---|--:|--:|--:|--:|--:|"]  # fmt: skip
        lines += [
            f"| {one['mode']} | {one['first']} | {one['second']} | {one['questions']} | {one['only_first']} | "
            f"{one['only_second']} | {_interval(one, 'difference')} | {one['mcnemar_p']:.2g} |"
            for one in summary["comparisons"]
        ]
        lines.append("")
    return "\n".join(lines)


def _by_group(summary: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    chosen = [line for line in summary["table"] if line["part"] == "closed" and line["by"] != "all" and line["asked"]]
    for mode in dict.fromkeys(line["mode"] for line in chosen):
        of_mode = [line for line in chosen if line["mode"] == mode]
        arms = list(dict.fromkeys(line["arm"] for line in of_mode))
        for by in dict.fromkeys(line["by"] for line in of_mode):
            lines += [f"## {mode}, by {by}", "", f"| {by} | asked | {' | '.join(arms)} |",
                      "|---|--:|" + "--:|" * len(arms)]  # fmt: skip
            found = {(line["group"], line["arm"]): line for line in of_mode if line["by"] == by}
            for group in dict.fromkeys(group for group, _ in found):
                cells = [_interval(found[group, arm]) if (group, arm) in found else "" for arm in arms]
                asked = max(found[group, arm]["asked"] for arm in arms if (group, arm) in found)
                lines.append(f"| {group} | {asked} | {' | '.join(cells)} |")
            lines.append("")
    return lines


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _interval(line: Mapping[str, Any], name: str = "accuracy") -> str:
    return f"{100 * line[name]:.1f} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"


def _draw_lengths(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    from vllm_wsi.study.plots import save_figure

    bins = [f"<{LENGTH_EDGES[0]}", *(length_bin(edge) for edge in LENGTH_EDGES)]
    used = [name for name in bins if any(line["group"] == name for line in lines)]
    runs = list(dict.fromkeys((line["mode"], line["arm"]) for line in lines))

    def draw(axes: Any) -> None:
        for place, (mode, arm) in enumerate(runs):
            own = [line for line in lines if (line["mode"], line["arm"]) == (mode, arm)]
            x = [used.index(line["group"]) + 0.08 * (place - (len(runs) - 1) / 2) for line in own]
            y = np.array([line["accuracy"] for line in own])
            error = [y - [line["low"] for line in own], [line["high"] for line in own] - y]
            style: dict[str, Any] = {"linestyle": "-" if arm == "slide" else ":", "capsize": 2, "marker": "o"}
            axes.errorbar(x, y, error, label=f"{mode} {arm}", markersize=4, **style)
        counts = {line["group"]: line["asked"] for line in reversed(lines)}
        axes.set_xticks(range(len(used)), [f"{name}\n{counts[name]}" for name in used])
        axes.set(xlabel="patches of the slide; questions", ylabel="accuracy, 95 % over slides", ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=8)

    return save_figure(path, draw)
