"""The checkpoint contract in transformers: config, weights, prompts, generation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GemmaConfig, MistralConfig

from vllm_wsi.errors import CheckpointError, SettingsError
from vllm_wsi.model.checkpoint import load_scorer, load_selector
from vllm_wsi.model.config import SLIDE_TOKEN, SparseWSIConfig
from vllm_wsi.model.init_checkpoint import init_checkpoint, new_model
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.slides import features_in_memory

D = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "small"
    init_checkpoint(path, TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=16))
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval()


def slide(n, seed=0):
    return features_in_memory(np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32))


def prompt(model, *text):
    return torch.tensor([model.config.slide_token_id if t == SLIDE_TOKEN else t for t in text])


def test_config_json_holds_the_whole_contract(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    wanted = {
        "architectures", "encoder", "feature_dim", "max_patches", "max_slide_positions", "model_type",
        "num_slide_tokens", "position_ids", "projector", "scorer", "slide_token_id", "summary_tokens", "text_config",
    }  # fmt: skip
    assert wanted <= set(config)
    assert config["architectures"] == ["SparseWSIForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert type(AutoConfig.from_pretrained(checkpoint)) is SparseWSIConfig


def test_weights_carry_the_three_prefixes(checkpoint):
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"scorer", "projector", "language_model"}  # noqa: SIM118


def test_the_tokenizer_holds_the_slide_token_as_one_token(checkpoint, model):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.encode(SLIDE_TOKEN, add_special_tokens=False) == [model.config.slide_token_id]
    text = "Grüße, 組織 \n\t<x>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_same_seed_gives_the_same_checkpoint_and_leaves_torchs_random_state(checkpoint, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    init_checkpoint(tmp_path / "again", TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=16))
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_a_directory_with_content_is_not_written_to(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SettingsError, match="wanted a new directory"):
        init_checkpoint(tmp_path, TinySettings(feature_dim=D))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_ids": "random"}, "position_ids: found 'random', wanted one of original, packed"),
        ({"num_slide_tokens": 0}, "num_slide_tokens: found 0"),
        ({"feature_dim": 0}, "feature_dim: found 0"),
        ({"summary_tokens": -1}, "summary_tokens: found -1, wanted 0 .. 31, fewer than num_slide_tokens"),
        ({"summary_tokens": 32}, "summary_tokens: found 32, wanted 0 .. 31, fewer than num_slide_tokens"),
        (
            {"summary_tokens": 8, "projector": {"inputs": ["features", "score"]}},
            "summary_tokens: found 8 beside a projector",
        ),
        ({"summary_tokens": 8, "projector": {"input_norm": False}}, "summary_tokens: found 8 beside a projector"),
        ({"max_slide_positions": 10**9}, "max_slide_positions: found 1000000000"),
    ],
)
def test_a_config_that_cannot_be_is_refused(options, message):
    with pytest.raises(CheckpointError, match=message):
        SparseWSIConfig(**options)


def test_a_model_with_summary_tokens_is_shown_them_or_refuses(tmp_path):
    init_checkpoint(
        tmp_path / "c", TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=16, summary_tokens=8)
    )
    made = SparseWSIForConditionalGeneration.from_pretrained(tmp_path / "c").eval()
    slide = features_in_memory(np.random.default_rng(0).standard_normal((100, D)).astype(np.float32))
    chosen, ids = made.selector().select(slide), prompt(made, 5, SLIDE_TOKEN, 6)
    assert (len(chosen.indices), chosen.num_tokens) == (24, 32)
    embeddings, positions = made.prepare(ids, [chosen])
    assert embeddings.shape[1] == positions.shape[1] == 34
    means = made.projector(chosen.pooled, torch.zeros(8), torch.tensor(100))
    assert torch.equal(embeddings[0, 25:33], means)
    assert torch.equal(embeddings[0, 1:25], made.projector(chosen.features, chosen.scores, torch.tensor(100)))
    with pytest.raises(ValueError, match="pooled: found none, wanted the means of the dropped patches, at most 8"):
        made.prepare(ids, [replace(chosen, pooled=None)])


def test_the_free_patches_of_a_question_scorer_are_a_part_of_those_that_are_kept():
    config = SparseWSIConfig(scorer={"kind": "question", "hidden_size": 8}, num_slide_tokens=32, summary_tokens=8)
    assert (config.scorer["free_tokens"], config.scorer_options["num_slide_tokens"]) == (6, 24)


@pytest.mark.parametrize(("table", "budget"), [(32_768, 28_672), (8192, 4096), (2048, 1024)])
def test_the_default_budget_leaves_positions_to_text(table, budget):
    text_config = {"model_type": "qwen2", "max_position_embeddings": table}
    assert SparseWSIConfig(text_config=text_config).slide_position_budget == budget
    assert SparseWSIConfig(text_config=text_config, position_ids="packed").slide_position_budget == 0


@pytest.mark.parametrize("inputs", [("features", "score"), ("score",)])
def test_a_token_may_say_the_models_own_score_and_how_many_were_scored(inputs):
    model, _ = new_model(TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=8, projector_inputs=inputs))
    model = model.eval()
    chosen = model.selector().select(slide(300, 1))

    def token(**changes):
        return model.prepare(torch.tensor([model.config.slide_token_id]), [replace(chosen, **changes)])[0][0]

    assert torch.equal(token(), token(scores=torch.zeros(32)))  # whoever chose, and whatever that one says
    assert not torch.allclose(token(), token(num_patches=3000))
    assert torch.equal(token(), token(num_patches=307, num_nonfinite=7))
    expected = model.projector(chosen.features, chosen.scores, torch.tensor(300))
    assert torch.allclose(token(), expected, atol=1e-5)
    model.projector.linear_score.weight.data.zero_()
    assert torch.equal(token(), token(num_patches=3000))


def test_a_token_without_features_says_the_same_of_patches_that_score_alike():
    settings = TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=0, projector_inputs=("score",))
    model, _ = new_model(settings)
    model = model.eval()
    model.scorer.out.weight.data[0, 1:] = 0  # the score is that of the first feature alone, less the mean
    chosen = model.selector().select(slide(300, 1))
    other = chosen.features.clone()
    other[:, [3, 4]] = chosen.features[:, [4, 3]]
    ids = torch.tensor([model.config.slide_token_id])
    tokens = [model.prepare(ids, [replace(chosen, features=features)])[0] for features in (chosen.features, other)]
    assert torch.allclose(tokens[0], tokens[1], atol=1e-5)
    assert not torch.allclose(tokens[0], model.prepare(ids, [replace(chosen, features=-chosen.features)])[0])


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        (["score"], "context", "inputs: found score beside a scorer of kind 'context', wanted 'patch'"),
        ([], "patch", r"inputs: found \[\], wanted some of features, score"),
        (["colour"], "patch", r"inputs: found \['colour'\], wanted some of features, score"),
    ],
)
def test_projector_inputs_that_cannot_be_are_refused(inputs, kind, message):
    with pytest.raises(CheckpointError, match=message):
        SparseWSIConfig(scorer={"kind": kind, "hidden_size": 64}, projector={"inputs": inputs})


def test_prepare_puts_projected_rows_in_the_placeholders_place(model):
    selections = [model.selector().select(slide(n, n)) for n in (5, 300)]
    ids = prompt(model, 1, SLIDE_TOKEN, 2, 3, SLIDE_TOKEN, 4)
    embeddings, positions = model.prepare(ids, selections)
    assert embeddings.shape == (1, 4 + 5 + 32, 64)
    for rows, one in zip((slice(1, 6), slice(8, 40)), selections, strict=True):
        projected = model.projector(one.features, one.scores, torch.tensor(one.num_candidates))
        assert torch.equal(embeddings[0, rows], projected)
    assert torch.equal(embeddings[0, [0, 6, 7, 40]], model.get_input_embeddings()(torch.tensor([1, 2, 3, 4])))
    assert positions[0, :8].tolist() == list(range(8))
    assert torch.equal(positions[0, 8:40], 8 + selections[1].indices)
    assert positions[0, 40] == 8 + 300


@pytest.mark.parametrize("count", [0, 2])
def test_a_prompt_with_another_number_of_slide_tokens_is_refused(model, count):
    selection = model.selector().select(slide(40))
    with pytest.raises(ValueError, match=f"holds {count} slide tokens, wanted one for each of 1"):
        model.prepare(prompt(model, 1, *[SLIDE_TOKEN] * count), [selection])


def test_save_and_load_answer_alike(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = SparseWSIForConditionalGeneration.from_pretrained(tmp_path).eval()
    selection, ids = model.selector().select(slide(200)), prompt(model, 1, SLIDE_TOKEN, 2)
    answers = [m.generate(ids, [selection], max_new_tokens=8, do_sample=False).tolist() for m in (model, again)]
    assert answers[0] == answers[1]


def test_generate_with_and_without_a_cache_agree_in_original_positions(model):
    selection, ids = model.selector().select(slide(3000)), prompt(model, 1, SLIDE_TOKEN, 2)
    answers = [
        model.generate(ids, [selection], max_new_tokens=8, do_sample=False, use_cache=cached).tolist()
        for cached in (True, False)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("text_config", [MistralConfig, GemmaConfig])
def test_any_causal_decoder_takes_the_slide(text_config):
    decoder = text_config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    config = SparseWSIConfig(text_config=decoder, feature_dim=D, slide_token_id=63)
    model = SparseWSIForConditionalGeneration(config).eval()
    answer = model.generate(
        torch.tensor([1, 63, 2]), [model.selector().select(slide(99))], max_new_tokens=3, min_new_tokens=3
    )
    assert answer.shape == (1, 3)


def test_the_answers_loss_reaches_projector_and_decoder(model):
    selection = model.selector().select(slide(64))
    embeddings, positions = model.prepare(prompt(model, 1, SLIDE_TOKEN, 2, 3), [selection])
    labels = torch.full(positions.shape, -100)
    labels[0, -1] = 3
    loss = model(inputs_embeds=embeddings, position_ids=positions, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())
    model.zero_grad()


def test_the_scorer_is_read_from_one_file_and_from_shards(model, checkpoint, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for one, other in zip(load_scorer(str(checkpoint)), load_scorer(str(tmp_path)), strict=True):
        assert one == other if not isinstance(one, torch.Tensor) else torch.equal(one, other)
    x = slide(500)
    assert torch.equal(load_selector(str(tmp_path)).select(x).indices, model.selector().select(x).indices)


def test_a_scorer_that_the_config_does_not_describe_is_refused(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["scorer"]["hidden_size"] = 17
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"scorer\.\*: found other weights than config\.json describes"):
        load_scorer(str(tmp_path))


def test_a_directory_without_weights_is_refused(checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"found neither model\.safetensors nor"):
        load_scorer(str(tmp_path))


def test_generate_takes_a_prompt_in_every_form_that_chat_templates_return(model, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": "Which tissue?"}]
    chat = [{"role": "user", "content": content}]

    def rendered(**options):
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, **options)

    selection, options = model.selector().select(slide(40)), {"max_new_tokens": 4, "do_sample": False}
    ids = rendered(return_dict=False)
    wanted = model.generate(torch.tensor(ids), [selection], **options).tolist()
    forms = [ids, [ids], tuple(ids), np.array(ids), torch.tensor([ids]), torch.tensor(ids, dtype=torch.int32)]
    forms += [rendered(), rendered(return_tensors="pt"), rendered(return_tensors="np", return_dict=False)]
    forms.append({"input_ids": ids})
    for form in forms:
        assert model.generate(form, [selection], **options).tolist() == wanted, type(form)
    assert model.generate(**rendered(return_tensors="pt"), selections=[selection], **options).tolist() == wanted


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ("What is it?", "found a str, wanted one prompt's token ids"),
        (None, "found a NoneType, wanted"),
        (["<|slide|>", "x"], "found a list of str, wanted"),
        ([], "found a list of shape (0,), wanted"),
        ([[1, 2], [3, 4]], "found a list of list of shape (2, 2), wanted"),
        ([[1, 2], [3]], "found a list of list, wanted"),
        ([1.0, 2.0], "found a list of float of shape (2,), wanted"),
        (torch.tensor([True, False]), "found torch.bool Tensor of shape (2,), wanted"),
        ({"attention_mask": [1]}, "found a tuple of shape (0,), wanted"),
        ([5, 320], "found id 320, wanted 0 .. 319"),
        ([5, -100], "found id -100, wanted 0 .. 319"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_sentence(model, ids, found):
    with pytest.raises(ValueError, match=r"^input_ids: ") as error:
        model.generate(ids)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_a_padded_prompt_is_refused(model):
    with pytest.raises(ValueError, match="attention_mask: found zeros, wanted one prompt without padding"):
        model.generate([1, 2], attention_mask=[0, 1])


def test_the_example_of_the_checkpoints_page_runs_as_it_stands(checkpoint, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/reference/checkpoint.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    with h5py.File(tmp_path / "slide.h5", "w") as file:
        file["features"] = np.random.default_rng(0).standard_normal((50, D)).astype(np.float32)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.strip()


def test_generate_ends_at_every_token_that_the_checkpoint_names(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    model = SparseWSIForConditionalGeneration.from_pretrained(tmp_path / "c").eval()
    free = model.generate([1, 2, 3], max_new_tokens=8, do_sample=False)[0].tolist()
    named = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    assert named["eos_token_id"] == AutoTokenizer.from_pretrained(tmp_path / "c").eos_token_id
    ends = [named["eos_token_id"], free[3]]
    (tmp_path / "c" / "generation_config.json").write_text(json.dumps(named | {"eos_token_id": ends}))
    model = SparseWSIForConditionalGeneration.from_pretrained(tmp_path / "c").eval()
    assert model.generate([1, 2, 3], max_new_tokens=8, do_sample=False)[0].tolist() == free[: free.index(free[3]) + 1]
