"""`vllm-wsi study`: its tables hold what was asked, and its figures are drawn from them."""

import csv
import json

import numpy as np
import pytest

from vllm_wsi.cli import main
from vllm_wsi.demo_model import DEMO_CHECKPOINT
from vllm_wsi.evaluation.ablations import ARMS, run_ablations
from vllm_wsi.evaluation.haystack import GENERATORS, HaystackWorld, groups_of_length
from vllm_wsi.evaluation.study import LEARNED, POLICY_NAMES, Study, by_length
from vllm_wsi.questions import SLIDE_MARK
from vllm_wsi.training.settings import TrainSettings

PNG = b"\x89PNG"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A study of 40 short and 8 longer virtual slides, by the command."""
    path = tmp_path_factory.mktemp("study") / "out"
    assert main(["study", "--slides", "100:40,600:8", "--out", str(path)]) == 0
    return path


def test_every_rule_is_judged_on_every_length_in_both_position_modes(out):
    rows = rows_of(out / "policies.csv")
    found = {(row["length"], row["positions"], row["rule"]) for row in rows}
    rules = {LEARNED, *POLICY_NAMES, "mmr of learned", "oracle", "blind"}
    wanted = {(n, mode, rule) for n in ("100", "600") for mode in ("original", "packed") for rule in rules}
    assert wanted <= found
    assert {rule for *_, rule in found} - rules <= {f"always {letter}" for letter in "ABCD"}


def test_learned_beats_the_blind_answer_and_its_own_difference_is_zero(out):
    rows = {(row["length"], row["positions"], row["rule"]): row for row in rows_of(out / "policies.csv")}
    learned, blind = (rows["100", "original", name] for name in (LEARNED, "blind"))
    assert float(learned["accuracy"]) > 0.9 > 0.5 > float(blind["accuracy"])
    assert float(learned["minus_learned"]) == 0
    assert float(blind["minus_learned_high"]) < 0
    assert float(blind["mcnemar_p"]) < 0.001
    assert float(learned["low"]) <= float(learned["accuracy"]) <= float(learned["high"])


def test_more_patches_hold_more_of_the_evidence_and_all_of_them_hold_it_all(out):
    rows = [row for row in rows_of(out / "k_sweep.csv") if row["length"] == "100"]
    assert [int(row["k"]) for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert float(rows[-1]["recall"]) == 1


def test_soft_and_hard_and_information_have_their_tables(out):
    (row, other) = rows_of(out / "soft_hard.csv")
    assert (row["length"], other["length"]) == ("100", "600")
    assert 0 < float(row["soft_mass_on_hard"]) <= 1
    assert {row["length"] for row in rows_of(out / "information.csv")} == {"100"}  # 8 slides are too few


def test_figures_are_drawn_and_the_record_says_what_was_run(out):
    for name in ("policies", "k_sweep", "soft_hard", "umap"):
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
    record = json.loads((out / "study.json").read_text())
    assert record["arguments"]["slides"] == "100:40,600:8"
    assert record["versions"]["torch"]
    assert str(out) not in json.dumps(record)


def test_a_question_file_is_studied_by_the_length_of_its_slides(tmp_path):
    world = HaystackWorld()
    (tmp_path / "features").mkdir()
    lines = ["Slide,Question,A,B,C,D,Answer"]
    for number, n in enumerate([40] * 3 + [90] * 3 + [300]):
        slide = world.slide("test", number, n)
        slide.write(tmp_path / "features" / f"s{number}.safetensors")
        item = slide.item()
        stem = item.question.removeprefix(f"{SLIDE_MARK}\n").splitlines()[0]
        lines.append(f"s{number},{stem},{','.join(item.options.values())},{item.answer}")
    (tmp_path / "questions.csv").write_text("\n".join(lines) + "\n")
    arguments = ["--questions", str(tmp_path / "questions.csv"), "--features", str(tmp_path / "features")]
    assert main(["study", *arguments, "--out", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out" / "policies.csv")
    learned = [row for row in rows if (row["rule"], row["positions"]) == (LEARNED, "original")]
    assert [(row["length"], row["questions"]) for row in learned] == [("0-64", "3"), ("64-128", "3"), ("256-512", "1")]
    assert not any(row["rule"] == "oracle" for row in rows)


def test_lengths_fall_into_the_bins_of_the_papers_figure():
    items = [HaystackWorld().slide("test", 0, n).item() for n in (63, 64, 127, 128, 4095, 4096, 9000)]
    found = {name: len(part) for name, part in by_length(items).items()}
    assert found == {"0-64": 1, "64-128": 2, "128-256": 1, "2048-4096": 1, ">=4096": 2}


@pytest.mark.parametrize("slides", ["", "100", "100:", "x:3", "0:3", "100:3,5:0"])
def test_a_list_of_slides_that_says_nothing_is_refused(slides):
    with pytest.raises(ValueError, match="wanted N:COUNT"):
        groups_of_length(slides, HaystackWorld())


def test_studies_of_one_seed_agree(tmp_path):
    groups = groups_of_length("64:6", HaystackWorld())
    tables = [Study(str(DEMO_CHECKPOINT), groups, tmp_path / name, seed=4).policies() for name in "ab"]
    assert tables[0] == tables[1]


def test_every_arm_is_trained_from_the_same_start_for_every_seed(tmp_path):
    generate = {"name": "haystack", "count": 8, "num_patches": 40, "feature_dim": 16}
    stage = {"data": {"generate": generate}, "steps": 2, "batch_size": 4, "warmup_steps": 0}
    settings = TrainSettings.model_validate(
        {
            "model": {"new": {"feature_dim": 16, "hidden_size": 64, "num_layers": 1, "num_slide_tokens": 4}},
            "stages": [
                stage | {"name": "a", "train": ["decoder"], "learning_rate": {"decoder": 1e-3}},
                stage
                | {"name": "b", "train": ["scorer", "projector"], "sparselearn": {"num_kept": 4, "denoiser": "none"}}
                | {"learning_rate": {"scorer": 1e-2, "projector": 1e-2}},
            ],
        }
    )
    groups = groups_of_length("50:4", HaystackWorld(feature_dim=16))
    rows = list(run_ablations(settings, groups, GENERATORS, [1, 2], tmp_path / "work"))
    assert [(row["seed"], row["arm"]) for row in rows] == [(seed, arm) for seed in (1, 2) for arm in ARMS]
    assert all(0 <= row["accuracy"] <= 1 and 0 <= row["soft_accuracy_without_denoiser"] <= 1 for row in rows)
    assert all(np.isfinite(row["evidence_recall"]) for row in rows)
    assert [path.name for path in (tmp_path / "work").iterdir() if path.name.startswith("tmp")] == []
