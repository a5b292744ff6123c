"""From the results files of an evaluation to its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_wsi.errors import SettingsError

from .report import compare, constant_rows, table, write_report
from .results import Row, read_results
from .runner import MAIN, Arm, Evaluation


def summarise(evaluation: Evaluation, others: Sequence[Path] = ()) -> dict[str, Any]:
    """Everything that the results files say, with baselines and comparisons beside it.

    Args:
        others: folders of earlier evaluations of the same task; their runs are compared with ours by McNemar's test.

    Raises:
        SettingsError: there are no results, or another folder has none that fit.
    """
    settings = evaluation.settings
    runs: dict[tuple[str, str], Sequence[Row]] = {}
    header: Mapping[str, Any] | None = None
    for arm in evaluation.arms:
        path = settings.out / arm.file_name
        if not path.is_file():
            continue
        run, found = read_results(path)
        header = header or run
        chosen = [found[one.key] for one in evaluation.asked(arm.mode) if one.key in found]
        if chosen:
            runs[arm.mode, arm.arm] = chosen
    if header is None or not runs:
        raise SettingsError(f"{settings.out}: found no results, wanted those of a run")
    comparisons: list[dict[str, Any]] = []
    constant_label = None
    for mode in settings.modes:
        main = runs.get((mode, MAIN))
        if main is None:
            continue
        if "constant" in settings.baselines and any(row.options and row.status != "missing" for row in main):
            constant_label, made = constant_rows(main)
            runs[mode, f"constant {constant_label}"] = made
        against = [(name, rows) for (of_mode, name), rows in runs.items() if of_mode == mode and name != MAIN]
        against += [(str(other), _main_rows(other, mode, header)) for other in others]
        for name, rows in against:
            if gap := compare(main, rows, settings.seed):
                comparisons.append({"mode": mode, "first": MAIN, "second": name, **gap})
    of_first = next(iter(runs.values()))
    missing = [row for row in of_first if row.status == "missing"]
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


def report(evaluation: Evaluation, others: Sequence[Path] = ()) -> int:
    """Writes the summary, prints what it comes to; returns 1 where questions went unanswered, else 0."""
    summary = summarise(evaluation, others)
    files = write_report(evaluation.settings.out, summary)
    errors = 0
    for line in summary["table"]:
        if line["by"] != "all" or not line["asked"]:
            continue
        errors += line["errors"]
        print(f"{line['mode']} {line['arm']} ({line['part']}): {line['correct']} of {line['asked']} right, "
              f"{100 * line['accuracy']:.1f} % [{100 * line['low']:.1f}, {100 * line['high']:.1f}]; "
              f"{line['unparsed']} unparsed, {line['errors']} errors")  # fmt: skip
    if summary["missing_slides"]:
        print(f"{summary['missing_questions']} questions not asked: {len(summary['missing_slides'])} slides without "
              f"usable features, such as {summary['missing_slides'][0]} (see summary.json)")  # fmt: skip
    print(f"see {', '.join(str(file) for file in files)}")
    if errors:
        print(f"{errors} questions got no answer and count as wrong; the same command asks them again")
    return 1 if errors else 0


def _main_rows(folder: Path, mode: str, header: Mapping[str, Any]) -> Sequence[Row]:
    path = folder / Arm("choice" if mode == "choice" else "generate", MAIN).file_name
    if not path.is_file():
        raise SettingsError(f"{path}: found no such results, wanted a run to compare with")
    run, rows = read_results(path)
    if run.get("data_sha256") != header["data_sha256"]:
        raise SettingsError(f"{path}: found results of another question file, wanted {header['data']}")
    return list(rows.values())
