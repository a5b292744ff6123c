"""A run whose scorer hears the question: what learns, what its checkpoint keeps, what it cannot be combined with."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vllm_wsi.cli.app import main
from vllm_wsi.errors import SettingsError
from vllm_wsi.haystack.generator import haystack_items
from vllm_wsi.haystack.recipe import GENERATORS
from vllm_wsi.model.chat_renderer import IGNORED, ChatRenderer
from vllm_wsi.model.checkpoint import load_selector
from vllm_wsi.model.init_checkpoint import init_checkpoint, new_model
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.question_reader import QuestionReader, question_query
from vllm_wsi.model.question_text import NO_TOKEN, question_ids, question_text
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.study.study_model import study_model
from vllm_wsi.training.batches import collate
from vllm_wsi.training.dataset import SlideDataset
from vllm_wsi.training.model import SparseLearnModel
from vllm_wsi.training.settings import TrainSettings
from vllm_wsi.training.sparselearn import SparseLearnSettings
from vllm_wsi.training.train import train

from .small_stage import NEW_MODEL, NUM_SLIDE_TOKENS, D, small_stage

NEW = NEW_MODEL | {"scorer_kind": "question", "scorer_hidden_size": 16, "scorer_rank": 4, "free_tokens": 1}


HARD = {"selection": "hard", "sparselearn": None, "train": ["projector"]}


def settings(**stage):
    return TrainSettings.model_validate({"model": {"new": NEW}, "stages": [small_stage("soft", **stage)]})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train(settings(), tmp_path_factory.mktemp("run") / "run", GENERATORS)


@pytest.mark.slow
def test_every_part_of_the_scorer_learns_and_its_checkpoint_hears_questions(checkpoint, tmp_path, capsys):
    torch.manual_seed(0)
    start = new_model(TinySettings(**NEW, seed=0))[0].scorer.state_dict()
    trained = load_file(checkpoint / "model.safetensors")
    for name, before in start.items():
        assert not torch.equal(trained[f"scorer.{name}"], before), name
    assert json.loads((checkpoint / "config.json").read_text())["scorer"] == {
        "kind": "question", "hidden_size": 16, "rank": 4, "free_tokens": 1,
    }  # fmt: skip
    slide = haystack_items("test", 1, 200, feature_dim=D)[0].slides[0]
    path = slide.write(tmp_path / "a.safetensors")
    told = []
    for question in ("Which finding?", "Is there necrosis?"):
        asked = ["select", str(path), "--checkpoint", str(checkpoint), "--question", question, "--device", "cpu"]
        assert main(asked) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["scores"] != told[1]["scores"]
    assert told[0]["num_selected"] == NUM_SLIDE_TOKENS


@pytest.mark.slow
def test_the_query_of_the_table_alone_is_the_whole_models(checkpoint):
    model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    selector = load_selector(str(checkpoint))
    reader = QuestionReader(selector.scorer, str(checkpoint))
    for text in ("x", "Which of these is it?\nA. one\nB. two", "ü" * 3000):
        ids = torch.tensor(question_ids(tokenizer, question_text([text])))
        with torch.no_grad():
            assert torch.allclose(reader.query(text), model.query(ids), atol=1e-6), text[:9]
    with pytest.raises(SettingsError, match="found an empty one"):
        reader.query("")
    assert torch.equal(question_query(selector, str(checkpoint), "x"), reader.query("x"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"questions_per_sequence": 2}, "questions_per_sequence: found 2 beside"),
        (HARD | {"train": ["projector", "decoder"], "lora": None}, "found decoder to train in a hard stage"),
        (HARD | {"lora": {"r": 2, "target_modules": ["embed_tokens"]}}, "found embed_tokens to train in a hard stage"),
        (HARD | {"lora": {"r": 2, "target_modules": ".*embed_tokens"}}, r"found \.\*embed_tokens to train in a hard"),
    ],
)
def test_what_would_part_a_question_from_its_patches_is_refused(stage, said, tmp_path):
    with pytest.raises(SettingsError, match=said):
        train(settings(**stage), tmp_path / "run", GENERATORS)


@pytest.mark.slow
def test_a_hard_stage_behind_the_soft_one_trains_on_what_each_question_is_shown(checkpoint, tmp_path):
    stages = [small_stage("soft"), small_stage("hard", **HARD)]
    run = TrainSettings.model_validate({"model": {"new": NEW}, "stages": stages})
    after = train(run, tmp_path / "run", GENERATORS)
    soft, hard = (load_file(path / "model.safetensors") for path in (checkpoint, after))
    changed = {name.partition(".")[0] for name, before in soft.items() if not torch.equal(before, hard[name])}
    assert changed == {"projector", "language_model"}  # by lora; the scorer and its queries stay


def test_a_question_for_a_scorer_that_hears_none_is_refused(tmp_path, capsys):
    checkpoint = tmp_path / "plain"
    assert main(["init-checkpoint", str(checkpoint), "--feature-dim", str(D)]) == 0
    path = haystack_items("test", 1, 50, feature_dim=D)[0].slides[0].write(tmp_path / "a.safetensors")
    asked = ["select", str(path), "--checkpoint", str(checkpoint), "--question", "x", "--device", "cpu"]
    assert main(asked) == 1
    assert "wanted a checkpoint whose scorer is of kind 'question'" in capsys.readouterr().err


def soft_model():
    model, tokenizer = new_model(TinySettings(**NEW, seed=0))
    gate = SparseLearnSettings(num_slide_tokens=NUM_SLIDE_TOKENS, k_start=8)
    return SparseLearnModel(model, gate), ChatRenderer(tokenizer)


def batch_of(model, renderer, count=3):
    items = haystack_items("train", count, 30, feature_dim=D)
    dataset = SlideDataset(items, renderer, model.model.config, 100)
    return items, collate([dataset[i] for i in range(count)], renderer.slide_token_id, 0)


def test_a_batch_holds_the_question_of_each_slide_and_its_padding():
    model, renderer = soft_model()
    items, batch = batch_of(model, renderer)
    for row, item in zip(batch["question_ids"], items, strict=True):
        wanted = question_ids(renderer.tokenizer, question_text([item.turns[-1][0]]))
        assert row[row != NO_TOKEN].tolist() == wanted
        assert "<image>" not in renderer.tokenizer.decode(wanted)


def test_the_shares_of_the_gate_follow_the_question_and_sum_to_k_at_most():
    model, renderer = soft_model()
    _, batch = batch_of(model, renderer)
    model(**batch)
    first = model.last_alpha
    assert (first.sum(dim=-1) <= int(model.sparselearn.num_slide_tokens) + 1e-3).all()
    model(**batch | {"question_ids": torch.full_like(batch["question_ids"], 7)})
    assert not torch.allclose(first, model.last_alpha)


def test_only_the_answer_to_the_question_that_is_heard_is_learned():
    model, renderer = soft_model()
    slide = haystack_items("train", 1, 30, feature_dim=D)[0].slides[0]
    item = SlideItem("x", (slide,), (("<image>\nWhich?", "B"), ("Why?", "So.")))
    found = SlideDataset([item], renderer, model.model.config, 100)[0]
    assert renderer.tokenizer.decode([one for one in found.labels if one != IGNORED]).startswith("So.")
    assert found.question == question_ids(renderer.tokenizer, "Why?")


def test_a_question_without_text_is_named_before_the_first_step():
    model, renderer = soft_model()
    slide = haystack_items("train", 1, 30, feature_dim=D)[0].slides[0]
    item = SlideItem("row 3", (slide,), (("<image>", "B"),))
    [problem] = SlideDataset([item], renderer, model.model.config, 100).problems(read=False)
    assert problem == "row 3: found no text in its last question, wanted one, which the scorer hears"


@pytest.mark.parametrize("free_tokens", [0, NUM_SLIDE_TOKENS])
def test_every_parameter_has_a_gradient_whatever_share_no_question_chooses(free_tokens):
    model, tokenizer = new_model(TinySettings(**NEW | {"free_tokens": free_tokens}, seed=0))
    soft = SparseLearnModel(model, SparseLearnSettings(num_slide_tokens=NUM_SLIDE_TOKENS, k_start=8))
    _, batch = batch_of(soft, ChatRenderer(tokenizer))
    soft(**batch)["loss"].backward()
    assert all(torch.isfinite(one.grad).all() for one in model.scorer.parameters())


def test_studies_refuse_a_scorer_that_hears_the_question(tmp_path):
    init_checkpoint(tmp_path / "asked", TinySettings(**NEW, seed=0))
    with pytest.raises(SettingsError, match="a study selects without one"):
        study_model(tmp_path / "asked")


def test_only_the_last_question_of_a_conversation_is_heard():
    assert question_text(["<image>\nWhich?", " A. one "]) == "Which?\nA. one"
    assert question_text(["", "<|slide|>"]) == ""
