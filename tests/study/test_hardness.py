"""The table of haystack's knobs: what it holds, and that its limits are limits."""

import csv

import pytest

from vllm_wsi.cli.app import main
from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT, groups_of_length
from vllm_wsi.stats import proportion_interval
from vllm_wsi.study.hardness import BAYES, KNOBS, ORACLE, hardness_rows
from vllm_wsi.study.study import LEARNED, POLICY_NAMES, Study

pytestmark = pytest.mark.slow
POLICIES = {LEARNED, *POLICY_NAMES, "mmr of learned", ORACLE, BAYES}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What the command writes."""
    path = tmp_path_factory.mktemp("hardness") / "out"
    assert main(["study", "--slides", "100:4", "--haystack-knobs", "80:2", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def rows(out):
    with open(out / "hardness.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Study(str(DEMO_CHECKPOINT), {}, tmp_path_factory.mktemp("study"))


def rows_of(study, knobs, slides):
    world = HaystackWorld(**knobs)
    ((length, items),) = groups_of_length(slides, world).items()
    return {row["policy"]: row for row in hardness_rows(study, "knob", length, items, world)}


def test_every_knob_has_a_row_for_every_policy(rows):
    found = [(row["knob"], row["length"], row["policy"]) for row in rows]
    assert sorted(found) == sorted((knob, "80", policy) for knob in KNOBS for policy in POLICIES)
    assert {row["questions"] for row in rows} == {"2"}


def test_the_page_has_a_line_for_every_knob_and_a_column_for_every_policy(out, rows):
    table = [line.strip("| ").split(" | ") for line in (out / "hardness.md").read_text().splitlines() if "|" in line]
    assert table[0][:3] == ["knob", "N", "questions"]
    assert set(table[0][3:]) == POLICIES
    assert [line[0] for line in table[2:]] == list(KNOBS)
    assert {len(line) for line in table} == {len(table[0])}
    first = next(row for row in rows if (row["knob"], row["policy"]) == (table[2][0], LEARNED))
    cell = table[2][table[0].index(LEARNED)]
    assert cell.startswith(f"{float(first['accuracy']):.2f} [{float(first['low']):.2f}, ")


def test_right_answers_have_their_exact_interval(study):
    row = rows_of(study, {}, "60:24")[ORACLE]
    exact = proportion_interval(round(row["accuracy"] * 24), 24)
    assert [row["low"], row["high"]] == pytest.approx([exact.low, exact.high], abs=1e-4)
    assert row["low"] < row["high"]


def test_the_oracle_keeps_all_and_nobody_keeps_more_than_the_bayes_limit_where_it_keeps_all(study):
    found = rows_of(study, {"lookalike_rate": 0.03, "key_patches": (1, 1)}, "2000:12")
    assert found[ORACLE]["key_patch_recall"] == found[BAYES]["key_patch_recall"] == 1
    assert found["random"]["key_patch_recall"] < 0.3
    assert found[BAYES]["accuracy"] > found["random"]["accuracy"]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.5, None), (1.0, 6)])
def test_slides_without_evidence_are_counted_and_have_no_recall(study, share, count):
    found = rows_of(study, {"empty_share": share}, "90:6")
    empty = sum(not len(HaystackWorld(empty_share=share).slide("test", i, 90).key_patches) for i in range(6))
    for row in found.values():
        assert row["empty_slides"] == (empty if count is None else count)
        assert (row["accuracy_of_empty"] == "") == (row["empty_slides"] == 0)
        assert (row["key_patch_recall"] == "") == (row["empty_slides"] == 6)
    assert count is not None or 0 < empty < 6


def test_the_bayes_row_knows_the_knob(study):
    """In a world whose types are turned the learned scorer is lost and the Bayes limit is not."""
    found = rows_of(study, {"shift_degrees": 90.0}, "2000:12")
    assert found[BAYES]["key_patch_recall"] == 1
    assert found[LEARNED]["key_patch_recall"] < 0.5


def test_slides_that_say_nothing_are_refused_before_anything_is_written(tmp_path, capsys):
    assert main(["study", "--haystack-knobs", "100", "--out", str(tmp_path / "out")]) == 1
    assert "slides: found '100', wanted N:COUNT" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
