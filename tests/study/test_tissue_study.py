import csv
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer

from vllm_wsi.cli.app import main
from vllm_wsi.errors import CheckpointError, SettingsError
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.study.study import LEARNED
from vllm_wsi.study.tissue_answering import Asked, first_tokens, write_answers
from vllm_wsi.study.tissue_probe import INVERSE_PENALTY, fit_probe
from vllm_wsi.study.tissue_settings import TissueStudySettings
from vllm_wsi.study.tissue_study import BLIND, EVERY, ORACLE, PROBE, UNTRAINED, TissueStudy
from vllm_wsi.tissue.tissue_generator import TissueSplit, tissue_items, tissue_pool
from vllm_wsi.tissue.tissue_patches import IDC_PATCHES, IDC_SLIDE
from vllm_wsi.tissue.tissue_questions import KINDS, TissueQuestion

from ..tissue.tissue_archives import write_archive
from .tissue_checkpoint import write_checkpoint

PNG = b"\x89PNG"
K = 4


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve patients with 6 to 12 patches each, a fifth of all tumour, and a slide of 25 patches with 5 of tumour."""
    path = tmp_path_factory.mktemp("tissue")
    write_archive(path / IDC_PATCHES, [0, 2, 1, 0, 3, 6, 2, 0, 4, 0, 3, 1])
    write_archive(path / IDC_SLIDE, [5], others=20)
    write_checkpoint(path / "checkpoint")
    return path


@pytest.fixture(scope="module")
def cache(folder):
    """Where features of the module's tests are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_WSI_CACHE", str(folder / "cache"))
        yield folder / "cache"


def arguments(folder, out, **changes):
    wanted = {"data": "tissue", "tissue-dir": folder, "checkpoint": folder / "checkpoint", "out": out}
    wanted |= {"slides": "10:2,all:1,40:1,natural:2", "shares": "0.1,0.25", "kinds": "presence,share_choice"} | changes
    return ["study", *(str(part) for name, value in wanted.items() for part in (f"--{name}", value))]


@pytest.fixture(scope="module")
def out(folder, cache, tmp_path_factory):
    """Folds 0 and 1, one after the other into one folder."""
    path = tmp_path_factory.mktemp("study") / "out"
    for fold in (0, 1):
        assert main(arguments(folder, path, fold=fold)) == 0
    return path


@pytest.mark.slow
def test_every_policy_keeps_its_patches_of_every_slide_of_both_folds(out):
    rows = rows_of(out / "selections.csv")
    policies = {LEARNED, *UNTRAINED, PROBE, ORACLE}
    slides = {(row["fold"], row["length"], row["share"], row["slide"]) for row in rows}
    assert {(*slide, policy) for slide in slides for policy in policies} == {
        (row["fold"], row["length"], row["share"], row["slide"], row["policy"]) for row in rows
    }
    assert {row["fold"] for row in rows} == {"0", "1"}
    pooled = [slide for slide in slides if slide[0] == "0" and slide[1] == "10"]
    assert sorted(slide[2] for slide in pooled) == ["0.0", "0.0", "0.1", "0.1", "0.25", "0.25"]
    assert {row["length"] for row in rows} == {"10", "all", "40", "natural", "near-whole"}
    assert all(int(row["kept"]) == K for row in rows)
    repeated = {row["length"]: int(row["num_repeated"]) > 0 for row in rows}
    assert repeated == {"10": False, "all": False, "40": True, "natural": False, "near-whole": False}


@pytest.mark.slow
def test_the_oracle_keeps_all_the_tumour_that_it_can_and_clean_slides_have_no_recall(out):
    for row in rows_of(out / "selections.csv"):
        if row["policy"] == ORACLE:
            assert int(row["kept_tumour"]) == min(K, int(row["num_tumour"]))
        assert (row["recall"] == "") == (row["num_tumour"] == "0")
    table = {(row["length"], row["share"], row["policy"]): row for row in rows_of(out / "selection_table.csv")}
    assert float(table["10", "0.25", ORACLE]["recall"]) == 1
    assert table["10", "0.25", ORACLE]["slides"] == "4"  # two of each fold
    assert float(table["10", "0.25", PROBE]["recall_of_probe"]) == 1
    assert float(table["10", "0.25", PROBE]["recall"]) == 1  # the pictures' colour tells the label
    assert ("10", "0.0", ORACLE) not in table


@pytest.mark.slow
def test_answers_are_scored_for_every_policy_and_all_patches_and_no_slide(out):
    rows = rows_of(out / "answers.csv")
    assert {row["policy"] for row in rows} == {LEARNED, *UNTRAINED, PROBE, ORACLE, EVERY, BLIND}
    assert {row["kind"] for row in rows} == {"presence", "share_choice"}
    for row in rows:
        if row["kind"] == "presence":
            assert row["gold"] == ("yes" if int(row["num_tumour"]) else "no")
        assert (row["correct"] == "1") == (row["likeliest"] == row["gold"])
        assert 0 < float(row["confidence"]) <= 1
        assert int(row["parsed"]) or not int(row["written_correct"])
    table = rows_of(out / "answer_table.csv")
    (row,) = (
        row
        for row in table
        if (row["kind"], row["length"], row["share"], row["policy"]) == ("presence", "10", "0.1", LEARNED)
    )
    assert row["questions"] == "8"  # two folds, two slides of the share and two clean ones each
    assert float(row["accuracy_low"]) <= float(row["accuracy"]) <= float(row["accuracy_high"])
    assert row["p"] == row["p_holm"] == ""
    assert all(row["p_holm"] for row in table if row["policy"] != LEARNED)


@pytest.mark.slow
def test_scores_calibration_figures_and_records_are_there(out):
    scores = rows_of(out / "scores.csv")
    assert {(row["fold"], row["patches"], row["policy"]) for row in scores} == {
        (fold, patches, policy)
        for fold in "01"
        for patches in ("patches of the fold", "near-whole")
        for policy in (LEARNED, PROBE, "top-norm")
    }
    assert all(float(row["auc"]) == 1 for row in scores if row["policy"] == PROBE)
    assert {row["kind"] for row in rows_of(out / "calibration.csv")} == {"presence", "share_choice"}
    names = {path.name for path in out.glob("*.png")}
    assert {"reliability.png", "recall_10.png", "presence_all.png", "near_whole-fold1-seed0.png"} <= names
    assert all(path.read_bytes().startswith(PNG) for path in out.glob("*.png"))
    record = json.loads((out / "study-fold1-seed0.json").read_text())
    assert (record["arguments"]["fold"], record["arguments"]["encoder"]) == ("1", "colour-texture")


@pytest.mark.slow
def test_a_fold_that_is_run_again_takes_the_place_of_its_rows(out, folder, cache):
    before = {name: rows_of(out / f"{name}.csv") for name in ("selections", "answers", "scores")}
    assert main(arguments(folder, out, fold=0)) == 0
    for name, rows in before.items():
        after = rows_of(out / f"{name}.csv")
        assert sorted(map(str, after)) == sorted(map(str, rows))


def test_a_study_without_the_tissues_folder_says_what_to_do(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out", **{"tissue-dir": tmp_path / "nowhere"})) == 1
    assert "found no such folder, wanted the folder of the labelled tissue" in capsys.readouterr().err
    assert main(["study", "--data", "tissue", "--out", str(tmp_path / "out")]) == 1
    assert "--data tissue: found no --tissue-dir or no --checkpoint beside it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slides": "10"}, "--slides: found '10', wanted N:COUNT"),
        ({"slides": "0:3"}, "--slides: found '0:3', wanted N:COUNT"),
        ({"slides": "all:0"}, "wanted at least one slide"),
        ({"shares": "0"}, "--shares: found '0', wanted numbers above 0"),
        ({"shares": "x"}, "--shares: found 'x'"),
        ({"kinds": "colour"}, "kinds.0: found 'colour'"),
    ],
)
def test_lengths_shares_and_kinds_that_say_nothing_are_refused(folder, tmp_path, capsys, change, message):
    assert main(arguments(folder, tmp_path / "out", **change)) == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_other_features_is_refused_before_anything_is_asked(folder, cache, tmp_path):
    settings = {"out": tmp_path / "out", "tissue_dir": folder, "slides": "10:1", "shares": "0.1", "kinds": ["presence"]}
    other = write_checkpoint(tmp_path / "other", feature_dim=7, encoder="colour-texture@1")
    with pytest.raises(ValueError, match="found d = 64, wanted 7"):
        TissueStudy(TissueStudySettings(checkpoint=str(other), **settings))
    far = TissueStudySettings(checkpoint=str(folder / "checkpoint"), **settings | {"slides": "4000:1"})
    with pytest.raises(SettingsError, match="num_patches: found 4000"):
        TissueStudy(far).run()


def test_the_probe_separates_what_colour_tells_and_scores_as_scikit_learn_does(folder, cache):
    pool = tissue_pool(TissueSplit(data=folder, encoder="colour-texture", num_views=2, side="all"))
    probe = fit_probe(pool, pool.labels, K)
    scores = probe.score(torch.from_numpy(np.array(pool.views[0])))
    assert scores[pool.labels].min() > scores[~pool.labels].max()
    x = np.concatenate([view[pool.rows] for view in pool.views]).astype(np.float32)
    standard = (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    fitted = LogisticRegression(C=INVERSE_PENALTY / 2, max_iter=300).fit(standard, np.tile(pool.labels, 2))
    wanted = fitted.decision_function(standard)[: len(scores)]
    assert scores.numpy() == pytest.approx(wanted, abs=1e-3)


@pytest.fixture(scope="module")
def answering(folder, cache):
    model = SparseWSIForConditionalGeneration.from_pretrained(folder / "checkpoint").eval()
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(folder / "checkpoint"))
    items = tissue_items(
        data=folder, encoder="colour-texture", count=6, num_patches=[9, 20], questions=KINDS, questions_per_slide=6
    )
    asked = []
    for number, item in enumerate(items):
        with item.slides[0].open() as slide:
            selection = model.selector().select(slide, 1 + number % 7)
        asked.append(Asked(item, item.asked, selection))
    return model, renderer, asked


def test_answers_in_a_batch_are_those_of_one_prompt_at_a_time(answering, monkeypatch):
    model, renderer, asked = answering
    written = write_answers(model, renderer, asked, 12)
    for one, answer in zip(asked, written, strict=True):
        ids = model.generate(renderer.question(one.item), [one.selection], max_new_tokens=12, do_sample=False)
        assert answer.text == renderer.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    monkeypatch.setattr("vllm_wsi.study.tissue_answering.BATCH_TOKENS", 1)
    alone = write_answers(model, renderer, asked, 12)
    assert [one.text for one in alone] == [one.text for one in written]
    for one, other in zip(alone, written, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_probabilities_are_those_of_the_first_tokens_and_sum_to_one(answering):
    model, renderer, asked = answering
    (answer,) = write_answers(model, renderer, asked[:1], 1)
    embeddings, positions = model.prepare(torch.tensor(renderer.question(asked[0].item)), [asked[0].selection])
    logits = model(inputs_embeds=embeddings, position_ids=positions).logits[0, -1]
    starts = first_tokens(renderer, asked[0].question)
    wanted = logits[list(starts.values())].softmax(0).tolist()
    assert list(answer.probabilities.values()) == pytest.approx(wanted, abs=1e-5)
    assert list(answer.probabilities) == list(asked[0].question.options)
    assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_a_question_without_a_slide_has_no_slide_token_and_answers_that_begin_alike_are_refused(answering):
    model, renderer, asked = answering
    (blind,) = write_answers(model, renderer, [asked[0]._replace(selection=None)], 3)
    assert sum(blind.probabilities.values()) == pytest.approx(1)
    alike = TissueQuestion("presence", "?", {"A": "x", "B": "y"}, {"A": "Yes, x", "B": "Yes, y"}, "A")
    with pytest.raises(CheckpointError, match="answers to a question of presence that begin with the same token"):
        first_tokens(renderer, alike)
