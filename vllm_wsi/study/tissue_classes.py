"""The study of eight tissues: one set of K tiles of a slide must serve eight questions, each about another tissue."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoTokenizer

from vllm_wsi.errors import needs_extra
from vllm_wsi.files import write_csv
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.checkpoint import loading
from vllm_wsi.selection.baselines import OraclePolicy, Policy, Selector, UniformPolicy, make_policy
from vllm_wsi.selection.patch_matrix import Patches
from vllm_wsi.settings import Settings
from vllm_wsi.slides.encoder_names import Mismatch
from vllm_wsi.stats import mean_interval, paired_p
from vllm_wsi.tissue.kather import KATHER, TISSUES, KatherSlide, kather_pool
from vllm_wsi.tissue.pooled_slides import PatchPool
from vllm_wsi.tissue.tissue_patches import tissue_archive

from .origin import write_origin
from .study import LEARNED, made_diverse
from .study_model import study_model
from .tissue_answering import Asked, scored, write_answers
from .tissue_study import BLIND, EVERY, ORACLE, PROBE, UNTRAINED
from .tissue_tables import named, with_holm
from .write_tissue import read_rows

Row = dict[str, Any]
INVERSE_PENALTY = 0.1  # C of the logistic regression, on features of variance 1
ITERATIONS = 500


class ClassStudySettings(Settings, frozen=True):
    """See `vllm-wsi study --help`, `--data kather`."""

    out: Path
    checkpoint: str
    tissue_dir: Path
    leave_out: str = "01"
    num_patches: int = Field(128, ge=1)  # of a slide; slides with fewer tiles are taken whole
    count: int = Field(20, ge=1)  # of slides
    max_new_tokens: int = Field(16, ge=1)
    unseen_wording: bool = False
    seed: int = 0
    encoder_mismatch: Mismatch = "refuse"

    def record(self) -> dict[str, str]:
        """What the record says was asked; where it was written, and where the data lay, says nothing."""
        return {name: str(value) for name, value in self if name not in ("out", "tissue_dir")}


@dataclass(frozen=True)
class ClassProbe(Policy):
    """In turn for each class, the tile not yet taken that a linear classifier finds likeliest to be of it.

    Scores are 0. It knows the classes by their labels, so it is a ceiling for a scorer that learned from answers.

    Args:
        weight: fp32 [d, classes].
        bias: fp32 [classes].
    """

    weight: Tensor
    bias: Tensor

    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        likely = (patches.features @ self.weight + self.bias).softmax(dim=1)
        order = likely.argsort(dim=0, descending=True, stable=True).T.tolist()
        places: dict[int, None] = {}
        for rank in range(len(patches.rows)):
            for of_class in order:
                places[of_class[rank]] = None
        return torch.tensor(list(places)[:k]), torch.zeros(k)


def fit_class_probe(pool: PatchPool, num_slide_tokens: int) -> ClassProbe:
    """A multinomial logistic regression on the tiles of a pool.

    Raises:
        SetupError: scikit-learn is not installed.
    """
    with needs_extra("study"):
        from sklearn.linear_model import LogisticRegression
    x, y = pool.views[0][pool.rows].astype(np.float64), pool.labels[pool.rows]
    fitted = LogisticRegression(C=INVERSE_PENALTY, max_iter=ITERATIONS).fit(x, y)
    if len(fitted.classes_) == 2:  # scikit-learn keeps one row for two classes
        weight, bias = np.stack((0 * fitted.coef_[0], fitted.coef_[0])), np.append(0, fitted.intercept_)
    else:
        weight, bias = fitted.coef_, fitted.intercept_
    return ClassProbe(num_slide_tokens, torch.from_numpy(weight.T).float(), torch.from_numpy(bias).float())


def class_oracle(tissues: np.ndarray, k: int) -> OraclePolicy:
    """In turn for each tissue of a slide, its next tile: as many of each as there are, up to an equal share."""
    of_tissue = [np.flatnonzero(tissues == one).tolist() for one in np.unique(tissues)]
    rows = [rows[rank] for rank in range(len(tissues)) for rows in of_tissue if rank < len(rows)]
    return OraclePolicy(k, rows)


def write_class_study(settings: ClassStudySettings) -> list[Path]:
    """Writes `class_answers.csv`, `class_table.csv` and a record into `settings.out`.

    A folder that holds the rows of other left-out slides or seeds keeps them, and the table is of all.

    Returns:
        The table.

    Raises:
        SetupError, SettingsError, SlideError, EncoderError, CheckpointError: of what was asked and what is read.
    """
    began = time.monotonic()
    made = _answer_all(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    path, own = settings.out / "class_answers.csv", (settings.leave_out, str(settings.seed))
    write_csv(path, [*(row for row in read_rows(path) if (row["left_out"], row["seed"]) != own), *made])
    table = settings.out / "class_table.csv"
    write_csv(table, class_table(read_rows(path)))
    record = settings.out / f"study-without{settings.leave_out}-seed{settings.seed}.json"
    write_origin(record, settings.record(), time.monotonic() - began)
    return [table]


def _answer_all(settings: ClassStudySettings) -> list[Row]:
    tissue_archive(settings.tissue_dir, KATHER)  # that it is there is told before a decoder is read
    with loading(settings.checkpoint):
        model = study_model(settings.checkpoint)
        renderer = ChatRenderer(AutoTokenizer.from_pretrained(settings.checkpoint))
    k = model.config.num_slide_tokens
    learned = model.selector(settings.encoder_mismatch)
    test, train = (_pool(settings, side) for side in ("test", "train"))
    probe = fit_class_probe(train, k)
    rows = []
    for number in range(settings.seed * 10_000, settings.seed * 10_000 + settings.count):
        slide = KatherSlide(test, min(settings.num_patches, len(test.rows)), number)
        policies: dict[str, Selector] = {LEARNED: learned, PROBE: probe, ORACLE: class_oracle(slide.tissues, k)}
        policies |= made_diverse(model, k) | {name: make_policy(name, k, settings.seed) for name in UNTRAINED}
        policies[EVERY] = UniformPolicy(slide.num_patches)
        with slide.open() as opened:
            chosen = {
                name: policy.select(opened, slide.num_patches if name == EVERY else k)
                for name, policy in policies.items()
            }
        items = [slide.item(tissue, settings.unseen_wording) for tissue in range(len(TISSUES))]
        items += [one for one in [slide.choice(settings.unseen_wording)] if one is not None]
        asked = [
            (name, item, Asked(item, item.asked, selection))
            for item in items
            for name, selection in [*chosen.items(), (BLIND, None)]
        ]
        written = write_answers(model, renderer, [one for *_, one in asked], settings.max_new_tokens)
        for (name, item, one), answer in zip(asked, written, strict=True):
            row = {"left_out": settings.leave_out, "seed": settings.seed, "slide": slide.name, "policy": name}
            row |= {"tissue": list(TISSUES.values())[item.tissue], "num_key": len(item.key_patches)}
            row |= (
                {"kept_key": ""}
                if one.selection is None
                else {"kept_key": int(np.isin(one.selection.indices.numpy(), item.key_patches).sum())}
            )
            rows.append(row | scored(one.question, answer))
    return rows


def _pool(settings: ClassStudySettings, side: Literal["train", "test"]) -> PatchPool:
    return kather_pool(settings.tissue_dir, settings.leave_out, side)


def class_table(rows: Sequence[Row]) -> list[Row]:
    """By kind of question, tissue ("any" for all) and policy: accuracy of the likeliest and of the written answers.

    `covered` is the share of questions about a tissue that is on the slide for which the kept tiles hold one of it.
    `all_right` is the share of slides whose eight questions are all answered right in writing. Intervals are over
    slides, each with all its questions. `p`: the sign-flip test over slides of the written answers against the learned
    policy's; `p_holm`: corrected for all rows of the table.

    Args:
        rows: of `class_answers.csv`; numbers, or text as the file has them.
    """
    groups: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["kind"], "any"][row["policy"]].append(row)
        if row["kind"] == "tissue_presence":
            groups[row["kind"], row["tissue"]][row["policy"]].append(row)
    found: list[Row] = []
    for (kind, tissue), by_policy in groups.items():
        learned = [float(row["written_correct"]) for row in by_policy.get(LEARNED, [])]
        for policy, part in by_policy.items():
            slides = [(row["left_out"], row["seed"], row["slide"]) for row in part]
            written = [float(row["written_correct"]) for row in part]
            row = {"kind": kind, "tissue": tissue, "policy": policy, "slides": len(set(slides)), "questions": len(part)}
            row |= named("accuracy", mean_interval([float(one["correct"]) for one in part], slides))
            row |= named("written_accuracy", mean_interval(written, slides))
            present = [one for one in part if one["kept_key"] != "" and int(one["num_key"])]
            covered = [float(int(one["kept_key"]) > 0) for one in present]
            row["covered"] = round(float(np.mean(covered)), 4) if covered else ""
            is_whole = (kind, tissue) == ("tissue_presence", "any")
            row["all_right"] = _all_right(slides, written) if is_whole else ""
            row["p"] = paired_p(written, learned, slides) if policy != LEARNED and learned else ""
            found.append(row)
    return with_holm(found)


def _all_right(slides: Sequence[Any], written: Sequence[float]) -> float:
    right: dict[Any, list[float]] = defaultdict(list)
    for slide, one in zip(slides, written, strict=True):
        right[slide].append(one)
    return round(float(np.mean([min(values) for values in right.values()])), 4)
