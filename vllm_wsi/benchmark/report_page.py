"""The page of an evaluation: its summary in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_wsi.stats import p_text

from .report_trust import trust_section

MAX_SLIDES_NAMED = 10


def page(summary: Mapping[str, Any]) -> str:
    """The text of summary.md, from what `report.summarise` returns."""
    lines = _head(summary)
    lines += _overall(summary, "closed", "Multiple choice")
    lines += _overall(summary, "open", "Open questions (words equal; F1 of words)")
    lines += trust_section(summary["table"])
    lines += _by_group(summary)
    lines += _comparisons(summary)
    return "\n".join(lines)


def _head(summary: Mapping[str, Any]) -> list[str]:
    """What was run, and what was left out."""
    run = summary["run"]
    encoders = ", ".join(summary["encoders"]) or "not said by the feature files"
    versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items() if value)
    lines = [
        f"# {run['task']}: {run['model']}",
        "",
        f"{run['data']} (sha256 {run['data_sha256'][:12]}), prompts {run['prompt_sha256'][:12]}, seed {run['seed']}, "
        f"greedy; {run['endpoint']}; encoder: {encoders}; {versions}.",
        "",
    ]
    if summary["skipped"]:
        lines += [f"{summary['skipped']} questions were left out on request.", ""]
    if missing := summary["missing_slides"]:
        named = ", ".join(missing[:MAX_SLIDES_NAMED])
        more = f" and {len(missing) - MAX_SLIDES_NAMED} more" if len(missing) > MAX_SLIDES_NAMED else ""
        lines += [
            f"{summary['missing_questions']} questions were not asked, as {len(missing)} slides have no usable "
            f"features: {named}{more}.",
            "",
        ]
    return lines


def _overall(summary: Mapping[str, Any], part: str, title: str) -> list[str]:
    """All closed, or all open, questions of each run."""
    rows = [row for row in summary["table"] if row["part"] == part and row["by"] == "all" and row["asked"]]
    if not rows:
        return []
    further = "nearest_choice" if summary["run"]["task"] == "wsi-vqa" else "balanced_accuracy"
    if part == "open":
        further = "token_f1"
    head = "| mode | run | asked | correct | accuracy, 95 % over slides | unparsed | errors | of parsed |"
    lines = [f"## {title}", "", f"{head} {further.replace('_', ' ')} |", "|---|---|" + "--:|" * 7]
    lines += [
        f"| {row['mode']} | {row['arm']} | {row['asked']} | {row['correct']} | {_interval(row)} | "
        f"{row['unparsed']} | {row['errors']} | {_percent(row.get('accuracy_of_parsed'))} | "
        f"{_percent(row.get(further))} |"
        for row in rows
    ]
    return [*lines, ""]


def _by_group(summary: Mapping[str, Any]) -> list[str]:
    """Closed questions by category and by length: a table for each grouping, a column for each run."""
    lines: list[str] = []
    chosen = [row for row in summary["table"] if row["part"] == "closed" and row["by"] != "all" and row["asked"]]
    for mode in dict.fromkeys(row["mode"] for row in chosen):
        of_mode = [row for row in chosen if row["mode"] == mode]
        arms = list(dict.fromkeys(row["arm"] for row in of_mode))
        for by in dict.fromkeys(row["by"] for row in of_mode):
            lines += [
                f"## {mode}, by {by}",
                "",
                f"| {by} | asked | {' | '.join(arms)} |",
                "|---|--:|" + "--:|" * len(arms),
            ]
            found = {(row["group"], row["arm"]): row for row in of_mode if row["by"] == by}
            for group in dict.fromkeys(group for group, _ in found):
                cells = [_interval(found[group, arm]) if (group, arm) in found else "" for arm in arms]
                asked = max(found[group, arm]["asked"] for arm in arms if (group, arm) in found)
                lines.append(f"| {group} | {asked} | {' | '.join(cells)} |")
            lines.append("")
    return lines


def _comparisons(summary: Mapping[str, Any]) -> list[str]:
    if not summary["comparisons"]:
        return []
    lines = [
        "## Against the others, on the same questions",
        "",
        "Paired by question; p by sign flips of slides (McNemar's exact test where each slide has one question), and "
        "the same corrected for all rows of this table (Holm).",
        "",
        "| mode | run | against | questions | right alone | other alone | difference | p | p, corrected |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {one['mode']} | {one['first']} | {one['second']} | {one['questions']} | {one['only_first']} | "
        f"{one['only_second']} | {_interval(one, 'difference')} | {p_text(one['p'])} | {p_text(one['p_holm'])} |"
        for one in summary["comparisons"]
    ]
    return [*lines, ""]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _interval(row: Mapping[str, Any], name: str = "accuracy") -> str:
    return f"{100 * row[name]:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
