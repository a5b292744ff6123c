"""Each arm against the paper's: which units are tested, and what a few seeds can say."""

import numpy as np
import pytest

from vllm_wsi.stats import holm
from vllm_wsi.study.ablation_tests import ablation_tests

PAPER = "paper"


def arm_rows(arm, accuracies, recall=0.5, length="100"):
    return [
        {"arm": arm, "seed": seed, "length": length, "accuracy": accuracy, "key_patch_recall": recall}
        for seed, accuracy in enumerate(accuracies)
    ]


def question_rows(arm, right, length="100"):
    """`right`: [seeds, questions]; two questions a slide."""
    return [
        {"arm": arm, "seed": seed, "length": length, "slide": f"s{question // 2}", "question": question}
        | {"correct": int(one), "key_patch_recall": ""}
        for seed, of_seed in enumerate(right)
        for question, one in enumerate(of_seed)
    ]


def test_five_seeds_that_all_say_the_same_have_a_p_of_one_in_sixteen():
    rows = arm_rows(PAPER, [0.9, 0.91, 0.92, 0.93, 0.94]) + arm_rows("worse", [0.1, 0.11, 0.12, 0.13, 0.15])
    accuracy, recall = ablation_tests(rows, [], PAPER)
    assert (accuracy["arm"], accuracy["against"], accuracy["measure"], accuracy["seeds"]) == (
        "worse",
        PAPER,
        "accuracy",
        5,
    )
    assert accuracy["difference"] == pytest.approx(-0.798)
    assert (accuracy["least_of_seeds"], accuracy["most_of_seeds"]) == (-0.8, -0.79)
    assert (accuracy["seeds_p"], accuracy["seeds_p_holm"]) == (0.0625, 0.125)
    assert (recall["measure"], recall["difference"], recall["seeds_p"], recall["seeds_p_holm"]) == (
        "key_patch_recall", 0, 1, 1,
    )  # fmt: skip
    assert accuracy["slides_p"] == accuracy["low"] == accuracy["slides_p_holm"] == ""


def test_slides_are_the_units_of_the_questions_and_seeds_are_averaged():
    right = np.ones((3, 12))
    less = right.copy()
    less[:, :8] = 0  # four of six slides, at all seeds
    rows = arm_rows(PAPER, right.mean(1)) + arm_rows("worse", less.mean(1))
    questions = question_rows(PAPER, right) + question_rows("worse", less)
    found = ablation_tests(rows, questions, PAPER)[0]
    assert found["slides"] == 6
    assert found["difference"] == pytest.approx(-8 / 12, abs=1e-4)
    assert found["low"] < found["difference"] < found["high"] < 0
    assert found["slides_p"] == 2 / 2**4  # not of 24 answers, nor of 8 questions


def test_an_arm_that_is_always_as_right_has_no_p_but_one_and_an_interval_of_some_width():
    right = np.ones((2, 6))
    rows = arm_rows(PAPER, [1, 1]) + arm_rows("same", [1, 1])
    found = ablation_tests(rows, question_rows(PAPER, right) + question_rows("same", right), PAPER)[0]
    assert (found["difference"], found["seeds_p"], found["slides_p"]) == (0, 1, 1)
    assert found["low"] < -0.5 < 0.5 < found["high"]  # three slides


def test_seeds_are_paired_by_their_number_and_lengths_are_kept_apart():
    rows = arm_rows(PAPER, [0.2, 0.8]) + arm_rows("other", [0.8, 0.2])[::-1] + arm_rows("other", [0.4], length="9")
    found = ablation_tests(rows, [], PAPER)
    assert [(row["length"], row["seeds"]) for row in found] == [("100", 2), ("100", 2)]  # no 9 of the paper's arm
    assert (found[0]["least_of_seeds"], found[0]["most_of_seeds"]) == (-0.6, 0.6)


def test_rows_of_a_csv_file_say_the_same_and_what_is_not_known_is_left_out():
    rows = arm_rows(PAPER, [0.9, 0.8], recall="") + arm_rows("worse", [0.5, 0.3], recall=float("nan"))
    text = [{name: str(value) for name, value in row.items()} for row in rows]
    (found,) = ablation_tests(rows, [], PAPER)
    assert ablation_tests(text, [], PAPER) == [found]
    assert found["seeds_p"] == 0.5


def test_all_rows_of_the_table_are_one_family():
    rng = np.random.default_rng(0)
    rows = [row for arm in (PAPER, "a", "b") for row in arm_rows(arm, rng.random(8), recall=rng.random())]
    found = ablation_tests(rows, [], PAPER)
    assert [row["seeds_p_holm"] for row in found] == pytest.approx(holm([row["seeds_p"] for row in found]), rel=0.01)
