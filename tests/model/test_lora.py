"""Adapters in peft's form: peft reads what is written here and the other way round; sums and merges are exact."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_wsi.errors import CheckpointError
from vllm_wsi.model.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LowRank, merge_lora, read_lora, sum_of, write_lora
from vllm_wsi.model.lora import served_rank as rank_to_serve

from .text_decoder import text_decoder

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def change(seed, rank, size_in=64, size_out=64):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, size_in, generator=generator) / 8, torch.randn(size_out, rank, generator=generator) / 8
    )


@pytest.fixture
def lora():
    return {Q: change(1, 3), DOWN: change(2, 5, size_in=96)}


def delta(one):
    return one.b.double() @ one.a.double()


def test_peft_reads_what_is_written_and_computes_the_same(lora, tmp_path):
    write_lora(tmp_path, lora, "base")
    ids = torch.arange(40)[None]
    merged = text_decoder(dtype=torch.float32)
    merge_lora(merged, lora, "x")
    adapted = peft.PeftModel.from_pretrained(text_decoder(dtype=torch.float32), tmp_path).eval()
    plain = text_decoder(dtype=torch.float32)(ids).logits
    found, wanted = adapted(ids).logits, merged(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (plain - wanted).abs().max() > 0.1
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "base"


def test_what_peft_writes_is_read_and_merges_as_peft_merges(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(text_decoder(dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    adapted.save_pretrained(tmp_path)
    lora, found = read_lora(tmp_path), text_decoder(dtype=torch.float32)
    assert len(lora) == 4
    merge_lora(found, lora, "x")
    wanted = adapted.merge_and_unload().state_dict()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-6)


def test_a_written_adapter_reads_as_the_same_change_whatever_its_ranks(lora, tmp_path):
    write_lora(tmp_path, lora, "base")
    found = read_lora(tmp_path)
    assert found.keys() == lora.keys()
    assert {len(one.a) for one in found.values()} == {5}
    for name, one in lora.items():
        assert torch.equal(delta(found[name]), delta(one))
    assert rank_to_serve(tmp_path) == 8


def test_the_sum_of_stages_is_exact_where_they_adapt_different_layers(lora):
    first, second = {Q: change(3, 1)}, lora
    total = sum_of([first, second])
    assert list(total) == [Q, DOWN]
    assert len(total[Q].a) == 4
    torch.testing.assert_close(delta(total[Q]), delta(first[Q]) + delta(lora[Q]), atol=1e-12, rtol=0)
    assert torch.equal(delta(total[DOWN]), delta(lora[DOWN]))
    assert sum_of([]) == {}


def test_a_merge_into_bfloat16_rounds_once(lora):
    decoder, before = text_decoder(), text_decoder()
    merge_lora(decoder, lora, "x")
    exact = before.get_submodule(Q).weight.double() + delta(lora[Q])
    found = decoder.get_submodule(Q).weight
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))
    untouched = "model.layers.1.self_attn.q_proj"
    assert torch.equal(decoder.get_submodule(untouched).weight, before.get_submodule(untouched).weight)


@pytest.mark.parametrize(
    ("name", "one", "sentence"),
    [
        ("model.layers.7.self_attn.q_proj", change(1, 2), "x: model.layers.7.self_attn.q_proj: found no such linear"),
        ("model.embed_tokens", change(1, 2), "x: model.embed_tokens: found no such linear layer"),
        (Q, change(1, 2, size_in=32), r"q_proj: found shape \(64, 32\), wanted \(64, 64\)"),
        ("lm_head", change(1, 2, size_out=258), "x: lm_head: found a change of tied embeddings"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_by_its_name(name, one, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        merge_lora(text_decoder(), {name: one}, "x")


def test_a_damaged_or_unknown_adapter_is_refused(lora, tmp_path):
    assert read_lora(tmp_path) == {}
    write_lora(tmp_path, lora, "base")
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    for key, value in (("use_dora", True), ("use_rslora", True), ("rank_pattern", {"q_proj": 2})):
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=f"{key}: found .*wanted a plain LoRA"):
            read_lora(tmp_path)
    for text in ("no json", "{}", "[]", json.dumps(config | {"r": 0})):
        (tmp_path / ADAPTER_CONFIG).write_text(text)
        with pytest.raises(CheckpointError, match="found no LoRA adapter that loads"):
            read_lora(tmp_path)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    weights = load_file(tmp_path / ADAPTER_WEIGHTS)
    name = f"base_model.model.{Q}.lora_A.weight"
    save_file({**weights, name: weights[name][:2].clone()}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match=r"wanted lora_A \[rank, in\] and lora_B \[out, rank\]"):
        read_lora(tmp_path)
    save_file({key: one for key, one in weights.items() if key != name}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match="wanted lora_A"):
        read_lora(tmp_path)
    save_file(weights | {"base_model.model.lm_head.bias": torch.zeros(3)}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(CheckpointError, match=r"lm_head\.bias"):
        read_lora(tmp_path)
    (tmp_path / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="found no LoRA adapter that loads"):
        read_lora(tmp_path)
