"""Scorer and projector are fp32 from the first step to the checkpoint; the decoder keeps its own dtype."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_wsi.errors import CheckpointError, SettingsError
from vllm_wsi.haystack.recipe import GENERATORS
from vllm_wsi.model.checkpoint import load_scorer, read_config
from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.training.settings import TrainSettings
from vllm_wsi.training.train import train

from .small_stage import NEW_MODEL, D, small_stage

MIXED = {("scorer", torch.float32), ("projector", torch.float32), ("language_model", torch.bfloat16)}


def dtypes(tensors) -> set[tuple[str, torch.dtype]]:
    return set(Counter((name.partition(".")[0], tensor.dtype) for name, tensor in tensors))


def tiny(dtype: torch.dtype | None = None):
    """dtype: of the decoder; scorer and projector are fp32."""
    new = TinySettings(**NEW_MODEL, scorer_hidden_size=16)
    model, tokenizer = new_model(new)
    model.language_model.to(dtype)
    return model, tokenizer


def saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def asked(start: dict, **changes) -> TrainSettings:
    return TrainSettings.of({"model": start, "stages": [small_stage("lora", **({"steps": 2} | changes))]}, "run.yaml")


@pytest.fixture
def mixed(tmp_path):
    return saved(tmp_path / "mixed", *tiny(torch.bfloat16))


def test_a_checkpoint_states_the_dtype_of_each_part_and_gives_it_back_bit_for_bit(mixed):
    stated = json.loads((mixed / "config.json").read_text())
    assert stated["dtype"] == "bfloat16"
    assert stated["part_dtypes"] == {"scorer": "float32", "projector": "float32"}
    assert dtypes(load_file(mixed / "model.safetensors").items()) == MIXED
    wanted = tiny(torch.bfloat16)[0].state_dict()
    for loaded in (
        SparseWSIForConditionalGeneration.from_pretrained(mixed),
        AutoModelForCausalLM.from_pretrained(mixed, dtype="auto"),
    ):
        assert loaded.dtype == torch.bfloat16
        assert dtypes(loaded.named_parameters()) == MIXED
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_dtype_that_the_loader_names_is_the_decoders_alone(mixed, dtype):
    loaded = SparseWSIForConditionalGeneration.from_pretrained(mixed, dtype=dtype)
    wanted = {("scorer", torch.float32), ("projector", torch.float32), ("language_model", dtype)}
    assert dtypes(loaded.named_parameters()) == wanted


def test_other_dtypes_of_scorer_and_projector_are_refused(mixed):
    stated = json.loads((mixed / "config.json").read_text())
    stated["part_dtypes"]["scorer"] = "bfloat16"
    (mixed / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=r"part_dtypes: found .*'scorer': 'bfloat16'"):
        read_config(str(mixed))


@pytest.mark.slow
def test_a_wholly_bf16_checkpoint_trains_scorer_and_projector_in_fp32(tmp_path):
    model, tokenizer = tiny()
    start = saved(tmp_path / "start", model.to(torch.bfloat16), tokenizer)
    assert {dtype for _, dtype in dtypes(load_file(start / "model.safetensors").items())} == {torch.bfloat16}
    made = train(asked({"checkpoint": str(start)}, trainer={"bf16": True}), tmp_path / "run", GENERATORS)
    after = load_file(made / "model.safetensors")
    assert dtypes(after.items()) == MIXED
    learned = load_file(tmp_path / "run" / "stages" / "0-lora" / "final" / "trainable.safetensors")
    assert {tensor.dtype for name, tensor in learned.items() if "num_slide_tokens" not in name} == {torch.float32}
    for name in ("scorer.hidden.weight", "projector.linear_1.weight"):
        assert not torch.equal(after[name], after[name].bfloat16().float())  # steps finer than bf16 are kept
    assert {tensor.dtype for tensor in load_scorer(str(made)).tensors()} == {torch.float32}
    assert json.loads((made / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "decoder", "new"])
@pytest.mark.parametrize(("said", "wanted"), [(None, "own"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_decoder_has_the_dtype_of_the_settings_or_its_own(tmp_path, mixed, kind, said, wanted):
    model, tokenizer = tiny(torch.bfloat16)
    saved(tmp_path / "decoder", model.language_model, tokenizer)
    start = {
        "checkpoint": {"checkpoint": str(mixed)},
        "decoder": {"decoder": str(tmp_path / "decoder"), "feature_dim": D, "num_slide_tokens": 4},
        "new": {"new": NEW_MODEL},
    }[kind]
    made = train(asked(start | {"dtype": said}, steps=1), tmp_path / "run", GENERATORS)
    if wanted == "own":
        wanted = "float32" if kind == "new" else "bfloat16"
    found = dtypes(load_file(made / "model.safetensors").items())
    assert found == {*MIXED - {("language_model", torch.bfloat16)}, ("language_model", getattr(torch, wanted))}
    assert json.loads((made / "config.json").read_text())["dtype"] == wanted


def test_a_decoder_of_half_precision_is_not_trained_itself(tmp_path, mixed):
    changes = {"train": ["projector", "decoder"], "lora": None, "sparselearn": None}
    with pytest.raises(SettingsError, match="lora: train: found a decoder in bfloat16, wanted float32"):
        train(asked({"checkpoint": str(mixed)}, **changes), tmp_path / "run", GENERATORS)


@pytest.mark.slow
def test_adapters_are_added_to_a_bf16_decoder_in_fp32_and_rounded_once(tmp_path, mixed):
    made = train(asked({"checkpoint": str(mixed)}), tmp_path / "run", GENERATORS)
    learned = load_file(tmp_path / "run" / "stages" / "0-lora" / "final" / "trainable.safetensors")
    before, after = load_file(mixed / "model.safetensors"), load_file(made / "model.safetensors")
    changed = 0
    for name, tensor in learned.items():
        if not name.endswith("lora_A.default.weight"):
            continue
        of = name.removesuffix(".lora_A.default.weight")
        plain = of.removeprefix("model.").replace("base_model.model.", "") + ".weight"
        delta = learned[f"{of}.lora_B.default.weight"] @ tensor * 2
        assert torch.equal(after[plain], (before[plain].float() + delta).bfloat16()), plain
        changed += int(not torch.equal(after[plain], before[plain]))
    assert changed
