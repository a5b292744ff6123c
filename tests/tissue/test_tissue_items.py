import json
from collections import Counter

import numpy as np
import pytest
import yaml

from vllm_wsi.benchmark.parsing import parse_label
from vllm_wsi.cli.app import main
from vllm_wsi.errors import SettingsError
from vllm_wsi.questions.items import SLIDE_MARK
from vllm_wsi.tissue.tissue_generator import TissueSplit, near_whole_slide, tissue_items, tissue_pool
from vllm_wsi.tissue.tissue_patches import IDC_PATCHES, IDC_SLIDE
from vllm_wsi.tissue.tissue_questions import KINDS, SHARE_CLASSES, STEMS, ask, share_class

from .tissue_archives import write_archive


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten patients, 72 patches, 12 of them tumour; and a slide."""
    path = tmp_path_factory.mktemp("tissue")
    write_archive(path / IDC_PATCHES, [0, 2, 1, 0, 3, 0, 2, 0, 4, 0])
    write_archive(path / IDC_SLIDE, [5], others=20)
    return path


def recipe(folder, **changes):
    return {"data": folder, "encoder": "colour-texture", "cache": folder / "cache", "num_views": 2} | changes


@pytest.mark.parametrize(
    ("share", "wanted"), [(0, 0), (1e-6, 1), (0.0499, 1), (0.05, 2), (0.2, 2), (0.2001, 3), (1, 3)]
)
def test_the_edges_of_the_shares_belong_where_the_page_says(share, wanted):
    assert share_class(share) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_every_right_answer_is_read_as_its_option_and_every_other_as_another(kind):
    rng = np.random.default_rng(0)
    for share in (0, 0.01, 0.1, 0.3):
        for _ in range(8):
            asked = ask(kind, share, rng)
            for label, answer in asked.answers.items():
                assert parse_label(answer, asked.options).label == label
            right = asked.options[asked.gold]
            if kind.startswith("share"):
                assert right == SHARE_CLASSES[share_class(share)]
            else:
                assert right in (("yes", "invasive carcinoma") if share else ("no", "no invasive carcinoma"))


def test_the_unseen_wording_is_never_asked_else():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        asked = {ask(kind, 0.1, rng).text.splitlines()[0] for _ in range(200)}
        assert asked == set(STEMS[kind][:-1])
        assert ask(kind, 0.1, rng, unseen_wording=True).text.splitlines()[0] == STEMS[kind][-1]


def test_options_stand_in_every_order_so_that_no_letter_is_more_likely():
    rng = np.random.default_rng(0)
    golds = Counter(ask("share_choice", 0.1, rng).gold for _ in range(400))
    assert set(golds) == set("ABCD")
    assert min(golds.values()) > 60


def test_items_are_conversations_about_slides_of_the_shares_that_were_asked(folder):
    items = tissue_items(**recipe(folder, count=60, num_patches=[8, 20], shares=[0, [0.1, 0.2]], questions=KINDS[:2]))
    assert len(items) == 60
    lengths = {item.slides[0].num_patches for item in items}
    assert min(lengths) >= 8
    assert max(lengths) <= 20
    assert len(lengths) > 5
    for item in items:
        (slide,), ((question, answer),) = item.slides, item.turns
        assert question.startswith(f"{SLIDE_MARK}\n")
        assert answer.startswith("Yes" if len(slide.key_patches) else "No")
    clean = sum(not len(item.slides[0].key_patches) for item in items)
    assert 15 < clean < 45


def test_questions_of_one_slide_share_it_and_are_of_different_kinds(folder):
    items = tissue_items(**recipe(folder, count=5, num_patches=10, questions=KINDS, questions_per_slide=6))
    for first in range(0, 30, 6):
        group = items[first : first + 6]
        assert len({item.slides for item in group}) == 1
        assert {item.asked.kind for item in group} == set(KINDS)
        assert all(
            item.options.keys() == item.asked.options.keys() for item in group if item.asked.kind[-6:] == "choice"
        )


def test_training_never_sees_a_patient_of_the_other_side(folder):
    split = TissueSplit(data=folder, encoder="colour-texture", cache=folder / "cache")
    for fold in range(3):
        train, test = (tissue_pool(split.changed(fold=fold, side=side)) for side in ("train", "test"))
        assert set(train.patients[train.rows]) & set(test.patients[test.rows]) == set()
    items = tissue_items(**recipe(folder, count=20, num_patches=12, shares=[0.2], fold=2))
    rows = np.concatenate([item.slides[0].draw().rows for item in items])
    assert set(train.patients[rows]) <= set(train.patients[train.rows])


def test_parts_that_meet_share_no_patient_and_leave_none_out(folder):
    def rows(**part):
        return tissue_pool(TissueSplit(**recipe(folder, side="train", **part))).rows

    split = TissueSplit(**recipe(folder))
    patients = tissue_pool(split).patients
    first, second = rows(part=(0, 0.6)), rows(part=(0.6, 1))
    assert not set(patients[first]) & set(patients[second])
    assert sorted([*first, *second]) == sorted(rows())
    assert np.array_equal(first, rows(part=(0, 0.6)))
    names = {tissue_pool(TissueSplit(**recipe(folder, part=part))).name for part in ((0, 0.6), (0.6, 1), (0, 1))}
    assert len(names) == 3  # slides of two parts never bear one name


@pytest.mark.parametrize("part", [(0.5, 0.5), (0.6, 0.5), (0, 0.01)])
def test_a_part_without_a_patient_is_refused(folder, part):
    with pytest.raises(SettingsError, match=r"part: found .* wanted at least one"):
        tissue_pool(TissueSplit(**recipe(folder, part=part)))


@pytest.mark.parametrize(("num_wordings", "wanted"), [(1, 1), (2, 2), (99, len(STEMS["presence"]) - 1)])
def test_a_recipe_may_ask_in_the_first_wordings_alone(folder, num_wordings, wanted):
    items = tissue_items(**recipe(folder, count=60, num_patches=8, num_wordings=num_wordings))
    assert {item.asked.text for item in items} == set(STEMS["presence"][:wanted])


def test_natural_slides_are_drawn_as_often_as_asked(folder):
    items = tissue_items(**recipe(folder, count=40, num_patches=12, natural_rate=1.0))
    assert all("patient" in item.slides[0].name for item in items)
    assert len({item.slides[0].name for item in items}) > 2


def test_the_same_recipe_gives_the_same_items_and_a_later_first_the_later_ones(folder):
    wanted = recipe(folder, count=6, num_patches=[8, 12], questions=KINDS)
    once, again = tissue_items(**wanted), tissue_items(**wanted)
    later = tissue_items(**(wanted | {"first": 3, "count": 3}))
    said = [[(item.turns, item.slides[0].name) for item in items] for items in (once, again, later)]
    assert said[0] == said[1]
    assert said[0][3:] == said[2]


def test_the_near_whole_slide_has_its_true_map_and_is_in_no_pool(folder):
    split = TissueSplit(data=folder, encoder="colour-texture", cache=folder / "cache", num_views=2)
    slide = near_whole_slide(split)
    assert (slide.num_patches, len(slide.key_patches)) == (25, 5)
    with slide.open() as opened:
        assert opened.read_coords()[:2].tolist() == [[101, 51], [151, 51]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shares": [[0, 0.1]]}, r"generate: tissue: shares: found \[0.0, 0.1\], wanted two shares above 0"),
        ({"shares": []}, "generate: tissue: shares: found"),
        ({"num_patches": [9, 3]}, r"num_patches: found \[9, 3\], wanted the least one first"),
        ({"num_patches": 500, "shares": [0.2]}, "wanted at most .* tumour patches"),
        ({"questions_per_slide": 2}, "questions_per_slide: found 2, wanted at most 1"),
        ({"questions": ["colour"]}, "generate: tissue: questions.0: found 'colour'"),
        ({"fold": 3}, "fold: found 3, wanted 0 to 2"),
        ({"sides": "test"}, "generate: tissue: sides: found 'test', wanted no key of this name"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_told(folder, change, message):
    with pytest.raises(SettingsError, match=message):
        tissue_items(**recipe(folder, count=1, num_patches=10) | change)


@pytest.mark.parametrize("option", [("--fold", "1"), ("--tissue-dir", "."), ("--leave-out", "03")])
def test_options_of_tissue_are_refused_where_no_stage_trains_on_it(tmp_path, capsys, option):
    assert main(["train", "haystack", "--out", str(tmp_path / "run"), *option]) == 1
    kind = "kather" if option[0] == "--leave-out" else "tissue"
    assert f"haystack: found no stage on {kind}, wanted one beside {option[0]}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_trains_on_the_generator_by_the_commands_folder_and_fold(folder, tmp_path, capsys):
    generate = recipe(folder, name="tissue", count=8, num_patches=12, shares=[0, 0.3], questions=list(KINDS))
    generate |= {"cache": str(folder / "cache")}
    del generate["data"]
    stage = {"name": "a", "data": {"generate": generate}, "train": ["scorer", "projector"], "steps": 2}
    stage |= {"batch_size": 4, "warmup_steps": 0, "sparselearn": {"num_slide_tokens": 4}}
    stage |= {"learning_rate": {"scorer": 1e-3, "denoiser": 1e-3, "projector": 1e-3}}
    new = {"feature_dim": 64, "hidden_size": 64, "num_layers": 1, "num_slide_tokens": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": {"new": new}, "stages": [stage]}))
    command = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert "a: found no data, wanted --tissue-dir" in capsys.readouterr().err
    assert main([*command, "--tissue-dir", str(folder), "--fold", "2"]) == 0
    assert (tmp_path / "run" / "checkpoint" / "config.json").is_file()
    asked = json.loads((tmp_path / "run" / "settings.json").read_text())["stages"][0]["data"]["generate"]
    assert (asked["data"], asked["fold"]) == (str(folder), 2)
