import csv

import numpy as np
import pytest
import torch

from vllm_wsi.cli.app import main
from vllm_wsi.errors import EncoderError
from vllm_wsi.study.study import DIVERSE, LEARNED
from vllm_wsi.study.tissue_classes import (
    ClassStudySettings,
    class_oracle,
    class_table,
    fit_class_probe,
    write_class_study,
)
from vllm_wsi.study.tissue_study import BLIND, EVERY, ORACLE, PROBE, UNTRAINED
from vllm_wsi.tissue.kather import KatherSlide, kather_pool

from ..tissue.kather_tiles import write_tiles
from .tissue_checkpoint import write_checkpoint

K = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_tiles(tmp_path_factory.mktemp("kather"), slides=("01", "02", "03"))
    for name in ("01", "02"):
        write_checkpoint(path / name, feature_dim=5, encoder=f"kather2016-texture@84-without-{name}", k=K)
    return path


@pytest.fixture(scope="module")
def out(folder):
    """Two left-out slides, one after the other into one folder, each with its own checkpoint."""
    path = folder / "out"
    for name in ("01", "02"):
        command = ["study", "--data", "kather", "--tissue-dir", folder, "--checkpoint", folder / name]
        command += ["--leave-out", name, "--slides", "20:2", "--out", path]
        assert main([str(part) for part in command]) == 0
    return path


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_eight_questions_are_asked_of_each_slide_for_every_policy(out):
    rows = [row for row in rows_of(out / "class_answers.csv") if row["kind"] == "tissue_presence"]
    assert len({row["slide"] for row in rows}) == 4
    policies = {LEARNED, DIVERSE, PROBE, ORACLE, *UNTRAINED, EVERY, BLIND}
    assert len(rows) == 4 * 8 * len(policies)
    assert {row["policy"] for row in rows} == policies
    for row in rows:
        assert row["gold"] == ("yes" if int(row["num_key"]) else "no")
        if row["policy"] == EVERY:
            assert row["kept_key"] == row["num_key"]
    table = {(row["kind"], row["tissue"], row["policy"]): row for row in rows_of(out / "class_table.csv")}
    row = table["tissue_presence", "any", LEARNED]
    assert (row["slides"], row["questions"]) == ("4", "32")
    assert float(table["tissue_presence", "any", EVERY]["covered"]) == 1
    assert float(table["tissue_presence", "any", ORACLE]["covered"]) >= float(row["covered"])
    assert table["tissue_presence", "lymphocytes", LEARNED]["all_right"] == ""


def test_a_checkpoint_that_saw_the_slide_is_refused(folder):
    settings = ClassStudySettings(
        out=folder / "no", checkpoint=str(folder / "01"), tissue_dir=folder, leave_out="03", num_patches=20, count=1
    )
    with pytest.raises(EncoderError, match=r"kather2016-texture@84-without-0[13]"):
        write_class_study(settings)
    assert not (folder / "no").exists()


@pytest.mark.parametrize("k", [1, 3, 7, 40])
def test_the_oracle_shows_every_tissue_before_it_shows_one_twice(folder, k):
    slide = KatherSlide(kather_pool(folder, "01", "test"), 30, 1)
    with slide.open() as opened:
        kept = class_oracle(slide.tissues, k).select(opened).indices.numpy()
    present = len(np.unique(slide.tissues))
    assert len(kept) == min(k, 30)
    assert len(np.unique(slide.tissues[kept])) == min(k, present)


def test_the_probe_covers_the_tissues_that_it_can_tell_apart(tmp_path):
    x_by_class = np.eye(8) * 20
    pool = kather_pool(write_tiles(tmp_path, counts=(6,) * 8, centres=x_by_class), "01", "train")
    probe = fit_class_probe(pool, 8)
    slide = KatherSlide(pool, 40, 3)
    with slide.open() as opened:
        selection = probe.select(opened)
    present = np.unique(slide.tissues)
    assert len(np.unique(slide.tissues[selection.indices.numpy()])) == min(8, len(present))
    assert torch.equal(selection.scores, torch.zeros(8))


def test_all_right_needs_every_answer_of_a_slide():
    def row(slide, right, policy=LEARNED):
        return {
            "kind": "tissue_presence", "tissue": "debris", "policy": policy, "left_out": "01", "seed": 0,
            "slide": slide, "correct": 1, "written_correct": right, "kept_key": 0, "num_key": 2,
        }  # fmt: skip

    rows = [row("a", 1), row("a", 1), row("b", 1), row("b", 0)]
    rows += [row(slide, 1, EVERY) for slide in "aabb"]
    (any_tissue, other, *_) = class_table(rows)
    assert (any_tissue["tissue"], any_tissue["all_right"], any_tissue["written_accuracy"]) == ("any", 0.5, 0.75)
    assert (other["policy"], other["all_right"], other["covered"]) == (EVERY, 1.0, 0.0)
    assert 0 < other["p"] <= other["p_holm"] <= 1
