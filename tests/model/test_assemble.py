"""Trained parts and their decoder give one checkpoint: the same bytes each time, refused where they do not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from vllm_wsi.cli.app import main
from vllm_wsi.errors import CheckpointError, SettingsError
from vllm_wsi.model.assemble import ADAPTER_FOLDER, assemble, assembled_folder
from vllm_wsi.model.checkpoint import load_scorer
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LowRank
from vllm_wsi.model.modeling import SlideProjector, SparseWSIForConditionalGeneration
from vllm_wsi.model.slide_token import add_slide_token
from vllm_wsi.model.trained_parts import BaseDecoder, TrainedParts, read_trained_parts, write_trained_parts
from vllm_wsi.model.weight_files import weights_sha256
from vllm_wsi.selection.scorer import seeded_scorer

from .text_decoder import text_decoder, text_tokenizer, write_text_decoder

D, Q = 16, "model.layers.0.self_attn.q_proj"


def make_parts(folder, decoder, lora=True, **changes):
    """Random parts over a decoder's directory."""
    model, tokenizer = text_decoder(), text_tokenizer()
    slide_token_id = add_slide_token(model, tokenizer)
    config = SparseWSIConfig(
        text_config=model.config, feature_dim=D, encoder="test@1", num_slide_tokens=4, slide_token_id=slide_token_id,
        scorer={"hidden_size": 8}, projector={"hidden_size": 24},
    )  # fmt: skip
    torch.manual_seed(5)
    weights = {
        f"scorer.{name}": one
        for name, one in seeded_scorer(kind="patch", feature_dim=D, hidden_size=8, seed=1).state_dict().items()
    }
    weights |= {f"projector.{name}": one for name, one in SlideProjector.from_config(config).state_dict().items()}
    change = {Q: LowRank(torch.randn(3, 64) / 8, torch.randn(64, 3) / 8)} if lora else {}
    base = BaseDecoder(str(decoder), None, weights_sha256(str(decoder)))
    parts = TrainedParts(
        config,
        base,
        weights,
        change,
        tokenizer.chat_template,
        GenerationConfig(eos_token_id=[7, 256], pad_token_id=256),
    )._replace(**changes)
    write_trained_parts(folder, parts, "# card\n")
    return parts


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_text_decoder(tmp_path_factory.mktemp("decoder") / "plain")


@pytest.fixture(scope="module")
def made(decoder, tmp_path_factory):
    """(the parts, their directory)"""
    folder = tmp_path_factory.mktemp("parts") / "trained"
    return make_parts(folder, decoder), folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_parts_read_back_as_they_were_written(made):
    parts, folder = made
    found = read_trained_parts(folder)
    assert found.base == parts.base
    assert found.weights.keys() == parts.weights.keys()
    assert all(torch.equal(found.weights[name], one) for name, one in parts.weights.items())
    assert all(torch.equal(one, wanted) for one, wanted in zip(found.lora[Q], parts.lora[Q], strict=True))
    assert found.chat_template == parts.chat_template
    assert found.generation_config.eos_token_id == [7, 256]
    assert (found.config.encoder, found.config.num_slide_tokens) == ("test@1", 4)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", ADAPTER_CONFIG, ADAPTER_WEIGHTS, "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors",
    ]  # fmt: skip


def test_the_checkpoint_is_the_decoder_with_its_adapter_merged_and_the_parts_as_they_are(made, decoder, tmp_path):
    parts, folder = made
    out = assemble(folder, tmp_path / "out")
    found, plain = load_file(out / "model.safetensors"), load_file(decoder / "model.safetensors")
    for name, one in parts.weights.items():
        assert torch.equal(found[name], one)
        assert found[name].dtype == torch.float32
    for name, one in plain.items():
        after = found[f"language_model.{name}"]
        assert after.dtype == torch.bfloat16
        if name == f"{Q}.weight":
            change = parts.lora[Q]
            one = (one.double() + change.b.double() @ change.a.double()).to(torch.bfloat16)
        assert torch.equal(after[: len(one)], one), name
    assert "language_model.lm_head.weight" not in found  # tied
    model = SparseWSIForConditionalGeneration.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.eos_token_id == [7, 256]
    load_scorer(str(out))  # as the server reads it, strictly
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids("<|slide|>") == model.config.slide_token_id == 258
    assert tokenizer.chat_template == parts.chat_template
    assert (out / "README.md").read_text() == "# card\n"


def test_the_same_input_gives_the_same_bytes(made, tmp_path):
    first, second = (contents(assemble(made[1], tmp_path / name)) for name in ("a", "b"))
    assert first == second


def test_an_adapter_left_apart_leaves_the_decoder_as_it_was(made, decoder, tmp_path):
    out = assemble(made[1], tmp_path / "out", merge=False)
    found, plain = load_file(out / "model.safetensors"), load_file(decoder / "model.safetensors")
    assert all(torch.equal(found[f"language_model.{name}"][: len(one)], one) for name, one in plain.items())
    assert sorted(path.name for path in (out / ADAPTER_FOLDER).iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]


def test_parts_without_an_adapter_need_no_merge(decoder, tmp_path):
    make_parts(tmp_path / "trained", decoder, lora=False)
    merged, apart = (
        contents(assemble(tmp_path / "trained", tmp_path / str(merge), merge=merge)) for merge in (True, False)
    )
    assert merged == apart


def test_a_decoder_of_other_weights_is_refused_unless_it_is_allowed(made, tmp_path):
    other = write_text_decoder(tmp_path / "other", seed=1)
    sentence = r"other: found weights of sha256 \w{12}, wanted \w{12} \(.*plain\), over which"
    with pytest.raises(CheckpointError, match=sentence):
        assemble(made[1], tmp_path / "out", decoder=str(other))
    assert not list(tmp_path.glob("out*"))
    out = assemble(made[1], tmp_path / "out", decoder=str(other), decoder_mismatch="allow")
    wanted = load_file(other / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(load_file(out / "model.safetensors")["language_model.model.embed_tokens.weight"][:258], wanted)


def test_the_same_decoder_at_another_place_fits(made, decoder, tmp_path):
    shutil.copytree(decoder, tmp_path / "moved")
    assert contents(assemble(made[1], tmp_path / "a", decoder=str(tmp_path / "moved"))) == contents(
        assemble(made[1], tmp_path / "b")
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "found no config.json in it"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 20), "found no checkpoint that loads"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "found no checkpoint that loads"),
        (
            lambda folder: edit(folder, base_decoder=None),
            "base_decoder: found None, wanted a mapping of name, revision",
        ),
        (lambda folder: edit(folder, slide_token_id=5), "slide_token_id: found 258, wanted 5, as the parts have it"),
        (lambda folder: edit(folder, feature_dim=17), "found no checkpoint that loads"),
        (
            lambda folder: save_file({"decoder.x": torch.zeros(1)}, folder / "model.safetensors"),
            r"model\.safetensors: found decoder\.x, wanted weights of scorer and projector alone",
        ),
    ],
)
def test_parts_that_are_damaged_are_refused_and_nothing_is_written(made, tmp_path, change, sentence):
    shutil.copytree(made[1], tmp_path / "trained")
    change(tmp_path / "trained")
    with pytest.raises(CheckpointError, match=sentence):
        assemble(tmp_path / "trained", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def edit(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_directory_with_content_is_not_overwritten_and_an_empty_one_is_taken(made, tmp_path):
    (tmp_path / "out").mkdir()
    assemble(made[1], tmp_path / "out")
    with pytest.raises(SettingsError, match="found a file or a directory with content"):
        assemble(made[1], tmp_path / "out")


def test_the_cache_holds_one_checkpoint_for_the_same_parts(made, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_WSI_CACHE", str(tmp_path / "cache"))
    first = assembled_folder(made[1])
    before = (first / "config.json").stat().st_mtime_ns
    assert assembled_folder(made[1]) == first
    assert (first / "config.json").stat().st_mtime_ns == before
    shutil.copytree(made[1], tmp_path / "trained")
    edit(tmp_path / "trained", num_slide_tokens=5)
    assert assembled_folder(tmp_path / "trained") != first


def test_the_command_says_how_to_serve_with_and_without_the_adapter(made, tmp_path, capsys):
    assert main(["assemble", str(made[1]), "--out", str(tmp_path / "a")]) == 0
    assert "--lora-modules" not in capsys.readouterr().out
    assert main(["assemble", str(made[1]), "--out", str(tmp_path / "b"), "--no-merge"]) == 0
    out = tmp_path / "b"
    assert f"--enable-lora --max-lora-rank 8 --lora-modules trained={out}/adapter" in capsys.readouterr().out
    assert main(["assemble", str(tmp_path / "nosuch"), "--out", str(tmp_path / "c")]) == 1
    assert "nosuch: found no config.json in it, wanted a directory of trained parts" in capsys.readouterr().err
