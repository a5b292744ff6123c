"""Haystack made harder, one knob at a time: which selections still answer, and how near they come to the Bayes limit.

The decoder reads what a policy keeps. So each row has the oracle (the key patches alone), which says what the decoder
makes of perfect evidence, and the Bayes limit, which says how much of the evidence a score of single patches can keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_wsi.files import write_atomically, write_csv
from vllm_wsi.haystack.bayes import BayesPolicy
from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import groups_of_length
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.baselines import OraclePolicy, Selector, UniformPolicy
from vllm_wsi.selection.selection import Selection
from vllm_wsi.selection.selection_measures import key_patch_recall
from vllm_wsi.stats import mean_interval, proportion_interval

from .answering import choose
from .study import Study
from .table_numbers import rounded

KNOBS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "look-alikes 3 %": {"lookalike_rate": 0.03},
    "one key patch": {"key_patches": (1, 1)},
    "noise 1.5": {"noise": 1.5},
    "noise 2": {"noise": 2.0},
    "two findings": {"num_findings": (2, 2)},
    "three findings": {"num_findings": (3, 3)},
    "a quarter without evidence": {"empty_share": 0.25},
    "shift 30 degrees": {"shift_degrees": 30.0},
    "shift 90 degrees": {"shift_degrees": 90.0},
    "look-alikes 3 %, one key patch": {"lookalike_rate": 0.03, "key_patches": (1, 1)},
}
"""What each row changes in haystack's world; slides keep all that the knob does not change."""

ORACLE, BAYES = "oracle", "bayes"


def write_hardness(study: Study, slides: str) -> None:
    """Writes `hardness.csv`, a row for each knob, length and policy, and `hardness.md`, a row for each knob and length.

    Args:
        study: whose checkpoint and policies are asked.
        slides: as `groups_of_length` takes them.

    Raises:
        SettingsError: `slides` is no such list.
    """
    rows: list[dict[str, Any]] = []
    for knob, changed in KNOBS.items():
        world = HaystackWorld(**changed)
        for length, items in groups_of_length(slides, world).items():
            rows += hardness_rows(study, knob, length, items, world)
            write_csv(study.out / "hardness.csv", rows)
    write_hardness_page(study.out / "hardness.md", rows)


def hardness_rows(
    study: Study, knob: str, length: str, items: Sequence[SlideItem], world: HaystackWorld
) -> list[dict[str, Any]]:
    """One row for each policy: right answers with their exact interval, and the share of the key patches kept.

    Slides without evidence count among the answers and not in the recall; their oracle keeps evenly spaced patches.
    """
    policies = study.policies() | {BAYES: BayesPolicy(study.k, world)}
    chosen: dict[str, list[list[Selection]]] = {name: [] for name in (*policies, ORACLE)}
    for item in items:
        key = item.slides[0].key_patches  # type: ignore[attr-defined]  # of a haystack slide
        oracle: Selector = OraclePolicy(study.k, key.tolist()) if len(key) else UniformPolicy(study.k)
        with item.slides[0].open() as slide:
            for name, policy in (policies | {ORACLE: oracle}).items():
                chosen[name].append([policy.select(slide, study.k)])
    rows = []
    for name, selections in chosen.items():
        answers = choose(study.model, study.renderer, items, selections)
        right = [answer.option == item.answer for answer, item in zip(answers, items, strict=True)]
        row = {"knob": knob, "length": length, "policy": name, "k": study.k, "questions": len(items)}
        share = proportion_interval(sum(right), len(right))
        row |= dict(zip(("accuracy", "low", "high"), map(rounded, share), strict=True))
        rows.append(row | _recall(items, selections, study.k, study.seed) | _of_empty(items, right))
    return rows


def _recall(items: Sequence[SlideItem], selections: list[list[Selection]], k: int, seed: int) -> dict[str, Any]:
    """Mean over the slides with evidence, and its interval."""
    found = []
    for item, (selection,) in zip(items, selections, strict=True):
        key = item.slides[0].key_patches  # type: ignore[attr-defined]
        if len(key):
            found.append(key_patch_recall(selection.indices.numpy(), key, k))
    names = ("key_patch_recall", "recall_low", "recall_high")
    if not found:
        return dict.fromkeys(names, "")
    return dict(zip(names, map(rounded, mean_interval(found, seed=seed)), strict=True))


def _of_empty(items: Sequence[SlideItem], right: Sequence[bool]) -> dict[str, Any]:
    """Slides without evidence, and the share of them that was answered right."""
    of_empty = [one for one, item in zip(right, items, strict=True) if item.slides[0].finding is None]  # type: ignore[attr-defined]
    return {"empty_slides": len(of_empty), "accuracy_of_empty": rounded(float(np.mean(of_empty))) if of_empty else ""}


def write_hardness_page(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows as a Markdown table: a line for each knob and length, a column for each policy."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    lines = [["knob", "N", "questions", *policies], ["---", *["--:"] * (len(policies) + 2)]]
    for knob, length in dict.fromkeys((row["knob"], row["length"]) for row in rows):
        of_line = {row["policy"]: row for row in rows if (row["knob"], row["length"]) == (knob, length)}
        count = of_line[policies[0]]["questions"]
        lines.append([knob, f"{int(length):,}", str(count), *(_cell(of_line[name]) for name in policies)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    head = (
        "Share of right answers with its exact 95 % interval; in parentheses the share of the key patches kept.\n"
        "Chance is 0.25; 0.33 with two findings, 0.50 with three.\n\n"
    )
    write_atomically(path, (head + table).encode())


def _cell(row: dict[str, Any]) -> str:
    recall = row["key_patch_recall"]
    kept = "" if recall == "" else f" ({recall:.2f})"
    return f"{row['accuracy']:.2f} [{row['low']:.2f}, {row['high']:.2f}]{kept}"
