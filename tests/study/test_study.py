"""`vllm-wsi study`: its tables hold what was asked, and its figures are drawn from them."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoTokenizer

from vllm_wsi.cli.app import main
from vllm_wsi.errors import SettingsError
from vllm_wsi.haystack.generator import HaystackWorld
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT, GENERATORS, groups_of_length
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.questions.finder import FeaturePath
from vllm_wsi.questions.items import SLIDE_MARK, multiple_choice
from vllm_wsi.stats import holm, proportion_interval
from vllm_wsi.study import ablations, soft, write_study
from vllm_wsi.study.ablations import ARMS, REFERENCE, SWITCHES, check_recipe, run_ablations
from vllm_wsi.study.groups import by_length
from vllm_wsi.study.judge import select_all
from vllm_wsi.study.study import LEARNED, POLICY_NAMES, Study
from vllm_wsi.training.model import SparseLearnModel
from vllm_wsi.training.settings import TrainSettings
from vllm_wsi.training.sparselearn import SparseLearn, SparseLearnSettings

pytestmark = pytest.mark.slow
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


def test_every_policy_is_judged_on_every_length_in_both_position_modes(out):
    rows = rows_of(out / "policies.csv")
    found = {(row["length"], row["positions"], row["policy"]) for row in rows}
    policies = {LEARNED, *POLICY_NAMES, "mmr of learned", "oracle", "blind"}
    wanted = {(n, mode, name) for n in ("100", "600") for mode in ("original", "packed") for name in policies}
    assert wanted <= found
    assert {name for *_, name in found} - policies <= {f"always {letter}" for letter in "ABCD"}


def test_learned_beats_the_blind_answer_and_is_not_compared_with_itself(out):
    rows = {(row["length"], row["positions"], row["policy"]): row for row in rows_of(out / "policies.csv")}
    learned, blind = (rows["100", "original", name] for name in (LEARNED, "blind"))
    assert float(learned["accuracy"]) > 0.9 > 0.5 > float(blind["accuracy"])
    assert learned["minus_learned"] == learned["p"] == learned["p_holm"] == ""
    assert float(blind["minus_learned_high"]) < 0
    assert float(blind["p"]) < float(blind["p_holm"]) < 0.001
    correct = round(40 * float(learned["accuracy"]))
    assert [float(learned[end]) for end in ("low", "high")] == pytest.approx(
        proportion_interval(correct, 40)[1:], abs=1e-4
    )


def test_no_interval_of_the_tables_has_no_width_and_no_p_is_zero(out):
    for table in ("policies", "k_sweep", "soft_hard"):
        for row in rows_of(out / f"{table}.csv"):
            ends = [name.removesuffix("low") for name in row if name.endswith("low") and row[name] != ""]
            assert ends
            assert all(float(row[f"{name}low"]) < float(row[f"{name}high"]) for name in ends)
            assert all(0 < float(row[name]) <= 1 for name in ("p", "p_holm") if row.get(name))


def test_every_p_of_a_table_is_corrected_for_all_of_it(out):
    rows = [row for row in rows_of(out / "policies.csv") if row["p"] != ""]
    wanted = holm([float(row["p"]) for row in rows])
    assert [float(row["p_holm"]) for row in rows] == pytest.approx(wanted, rel=0.01)


def test_more_patches_hold_more_of_the_key_patches_and_all_of_them_hold_it_all(out):
    rows = [row for row in rows_of(out / "k_sweep.csv") if row["length"] == "100"]
    assert [int(row["k"]) for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert float(rows[-1]["key_patch_recall"]) == 1


def test_soft_and_hard_and_information_have_their_tables(out):
    (row, other) = rows_of(out / "soft_hard.csv")
    assert (row["length"], other["length"]) == ("100", "600")
    assert 0 < float(row["soft_mass_on_hard_low"]) < float(row["soft_mass_on_hard"]) < 1
    assert {row["length"] for row in rows_of(out / "information.csv")} == {"100"}  # 8 slides are too few


def test_figures_are_drawn_and_the_record_says_what_was_run(out):
    for name in ("policies", "k_sweep", "soft_hard", "umap"):
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
    record = json.loads((out / "study.json").read_text())
    assert record["arguments"]["slides"] == "100:40,600:8"
    assert record["versions"]["torch"]
    assert str(out) not in json.dumps(record)


def test_lengths_fall_into_the_bins_of_the_papers_figure():
    items = [HaystackWorld().slide("test", 0, n).item() for n in (63, 64, 127, 128, 4095, 4096, 9000)]
    found = {name: len(part) for name, part in by_length(items).items()}
    assert found == {"<64": 1, "64-128": 2, "128-256": 1, "2048-4096": 1, ">=4096": 2}


@pytest.mark.parametrize("slides", ["", "100", "100:", "x:3", "0:3", "100:3,5:0"])
def test_a_list_of_slides_that_says_nothing_is_refused(slides):
    with pytest.raises(SettingsError, match="wanted N:COUNT"):
        groups_of_length(slides, HaystackWorld())


def test_studies_of_one_seed_agree(tmp_path):
    groups = groups_of_length("64:2", HaystackWorld())
    tables = [Study(str(DEMO_CHECKPOINT), groups, tmp_path / name, seed=4).policy_rows() for name in "ab"]
    assert tables[0] == tables[1]


def tiny_recipe(feature_dim=16, **sparselearn):
    """A recipe of two stages for slides of few patches."""
    generate = {"name": "haystack", "count": 8, "num_patches": 40, "feature_dim": feature_dim}
    stage = {"data": {"generate": generate}, "steps": 2, "batch_size": 4, "warmup_steps": 0}
    new = {"feature_dim": feature_dim, "hidden_size": 64, "num_layers": 1, "num_slide_tokens": 4}
    return {
        "model": {"new": new},
        "stages": [
            stage | {"name": "a", "train": ["decoder"], "learning_rate": {"decoder": 1e-3}},
            stage
            | {"name": "b", "train": ["scorer", "projector"], "sparselearn": {"num_slide_tokens": 4, **sparselearn}}
            | {"learning_rate": {"scorer": 1e-2, "denoiser": 1e-2, "projector": 1e-2}},
        ],
    }


def question_files(path, lengths, world, break_slide=lambda x: x):
    """`--questions FILE --features DIR` of virtual slides of these lengths, two of each name in two folders.

    `break_slide` may change their features.
    """
    for centre in ("centre0", "centre1"):
        (path / "features" / centre).mkdir(parents=True)
    lines = ["Slide,Question,A,B,C,D,Answer"]
    for number, n in enumerate(lengths):
        slide = world.slide("test", number, n)
        name = f"centre{number % 2}/s{number // 2}"
        features = break_slide(torch.from_numpy(slide.features()))
        save_file({"features": features}, path / "features" / f"{name}.safetensors")
        item = slide.item()
        stem = item.question.removeprefix(f"{SLIDE_MARK}\n").splitlines()[0]
        lines.append(f"{name},{stem},{','.join(item.options.values())},{item.answer}")
    (path / "questions.csv").write_text("\n".join(lines) + "\n")
    return ["--questions", str(path / "questions.csv"), "--features", str(path / "features")]


def test_every_arm_is_trained_from_the_same_start_for_every_seed(tmp_path):
    settings = TrainSettings.model_validate(tiny_recipe(tau_start=1.0, k_fraction=0.3))
    groups = groups_of_length("50:4", HaystackWorld(feature_dim=16))
    results = list(run_ablations(settings, groups, GENERATORS, [1, 2], tmp_path / "work"))
    rows = [row for row, _ in results]
    assert [(row["seed"], row["arm"]) for row in rows] == [(seed, arm) for seed in (1, 2) for arm in ARMS]
    assert all(0 <= row[name] <= 1 for row in rows for name in ("accuracy", "soft_accuracy"))
    assert all(row["soft_questions"] == 4 and row["hard_accuracy_of_the_same"] == row["accuracy"] for row in rows)
    assert all(np.isfinite(row["key_patch_recall"]) for row in rows)
    assert all(0 < row["soft_mass_on_hard"] < 1 for row in rows)  # Gumbel's too: it draws other patches
    assert {row["arm"] for row in rows if row["schedules"] == "tuned for this arm"} == {REFERENCE}
    moved = {row["arm"] for row in rows if row["leakage_max"] > 0}
    assert moved == {"noise gate, global denoiser"}
    for row, questions in results:
        assert np.mean([one["correct"] for one in questions]) == pytest.approx(row["accuracy"])
        assert np.mean([one["key_patch_recall"] for one in questions]) == pytest.approx(
            row["key_patch_recall"], abs=1e-3
        )
        assert {(one["arm"], one["seed"], one["length"]) for one in questions} == {(row["arm"], row["seed"], "50")}
    assert [path.name for path in (tmp_path / "work").iterdir() if path.name.startswith("tmp")] == []


def test_a_recipe_with_a_ready_scorer_is_refused_since_every_arm_begins_with_a_new_one():
    recipe = tiny_recipe() | {"model": {"decoder": "x", "scorer_from": "run/checkpoint"}}
    groups = groups_of_length("50:1", HaystackWorld(feature_dim=16))
    with pytest.raises(SettingsError, match="scorer_from: found run/checkpoint, wanted none: every arm begins"):
        check_recipe(TrainSettings.model_validate(recipe), groups)


def test_the_soft_path_is_judged_through_its_own_denoiser_at_the_k_that_is_served(monkeypatch):
    model = SparseWSIForConditionalGeneration.from_pretrained(DEMO_CHECKPOINT).eval()
    encoder = ChatRenderer(AutoTokenizer.from_pretrained(DEMO_CHECKPOINT))
    gate = SparseLearn(64, SparseLearnSettings(k_end=8))
    torch.nn.init.normal_(gate.denoiser.down.weight)
    before = {name: tensor.clone() for name, tensor in gate.state_dict().items()}
    seen = []

    class Noted(SparseLearnModel):
        def tail_logits(self, **batch):
            seen.append(self.sparselearn)
            return super().tail_logits(**batch)

    monkeypatch.setattr(soft, "SparseLearnModel", Noted)
    items = HaystackWorld().items("test", 2, 300)
    chosen = select_all(items, {LEARNED: model.selector()}, 32)[LEARNED]
    found = soft.judge_soft(model, encoder, items, gate, chosen)
    assert len(found.correct) == len(seen) == 2
    assert (int(seen[0].num_slide_tokens), float(seen[0].tau)) == (32, pytest.approx(0.1))
    assert torch.equal(seen[0].denoiser.down.weight, gate.denoiser.down.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gate.state_dict().items())


def test_ablations_of_another_feature_size_are_refused_before_anything_is_judged(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe()))
    arguments = ["study", "--ablations", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert ": found d = 64, wanted 16, as the recipe trains" in capsys.readouterr().err
    plain = tiny_recipe()
    plain["stages"].pop()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    assert main(arguments) == 1
    assert "stage a: found no sparselearn" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def of_questions(tmp_path_factory):
    """(Folder of a study with ablations of a question file, the gates of the arms it trained, that of the recipe):
    bfloat16 files with a NaN patch each, most of a length that K keeps whole."""

    def broken(x):
        x[3] = torch.nan
        return x.bfloat16()

    def note(model, stage, *arguments):
        seen.append(stage.sparselearn)
        return run(model, stage, *arguments)

    path, seen, run = tmp_path_factory.mktemp("questions"), [], ablations.run_stage
    arguments = question_files(path, [33] * 33 + [200], HaystackWorld(), broken)
    recipe = tiny_recipe(64, tau_start=1.0, tau_end=0.2, tau_fraction=0.5, k_start=30, k_fraction=0.3, gate="scale")
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments += ["--ablations", str(path / "recipe.yaml"), "--seeds", "1"]  # one seed: in this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "run_stage", note)
        assert main(["study", *arguments, "--out", str(path / "out")]) == 0
    return path / "out", seen, TrainSettings.model_validate(recipe).stages[-1].sparselearn


def test_a_question_file_is_studied_by_the_length_of_its_slides(of_questions):
    rows = rows_of(of_questions[0] / "policies.csv")
    learned = [row for row in rows if (row["policy"], row["positions"]) == (LEARNED, "original")]
    assert [(row["length"], row["questions"]) for row in learned] == [("<64", "33"), ("128-256", "1")]
    assert not any(row["policy"] == "oracle" for row in rows)


def test_an_arm_changes_its_switches_and_nothing_else_of_the_recipe(of_questions):
    _, seen, own = of_questions
    switches = [{"gate": gate.gate, "denoiser": gate.denoiser, "relaxation": gate.relaxation} for gate in seen]
    assert switches == [SWITCHES | changes for changes in ARMS.values()]
    restored = [gate.changed(gate=own.gate, denoiser=own.denoiser, relaxation=own.relaxation) for gate in seen]
    assert all(gate == own for gate in restored)


def test_ablations_beside_questions_are_judged_on_them_broken_patches_and_all(of_questions):
    out = of_questions[0]
    rows = rows_of(out / "ablations.csv")
    assert {(row["length"], row["questions"]) for row in rows} == {("<64", "33"), ("128-256", "1")}
    assert {row["leakage_slides"] for row in rows} == {"16", "1"}  # K is 4
    questions = rows_of(out / "ablation_questions.csv")
    names = [f"centre{number % 2}/s{number // 2}.safetensors" for number in range(34)]
    assert [row["slide"] for row in questions] == names * len(ARMS)
    tests = rows_of(out / "ablation_tests.csv")  # key patches are not known here
    assert [(row["arm"], row["measure"]) for row in tests[::2]] == [
        (arm, "accuracy") for arm in ARMS if arm != REFERENCE
    ]
    assert {(row["seeds"], row["seeds_p"]) for row in tests} == {("1", "1.0")}
    assert {(row["length"], row["slides"]) for row in tests} == {("<64", "33"), ("128-256", "1")}
    assert (out / "umap.png").read_bytes().startswith(PNG)
    # All 32 finite patches of the short slides are kept: nothing is dropped to inform of.
    assert not (out / "information.csv").exists()


def test_the_picture_shows_finite_patches_as_the_file_means_them(tmp_path, monkeypatch):
    x = HaystackWorld().slide("test", 0, 150).features()
    x[[0, 7]] = np.nan
    path = tmp_path / "s.safetensors"
    save_file({"features": torch.from_numpy(x).bfloat16()}, path)
    item = multiple_choice("row 1", FeaturePath(path), "Which?", {"A": "x", "B": "y"}, "A")
    study = Study(str(DEMO_CHECKPOINT), {"all": [item]}, tmp_path / "out")
    study.policy_rows()
    drawn = []
    monkeypatch.setattr(write_study, "draw_umap", lambda path, *arguments: drawn.append(arguments))
    write_study._draw_kept(study, study.groups, tmp_path)
    ((features, kept, key, _),) = drawn
    assert features.shape == (148, 64)
    assert np.isfinite(features).all()
    selection = study.judged["all", LEARNED].selections[0][0]
    assert np.array_equal(features[kept], selection.features.float().numpy())
    assert key is None
