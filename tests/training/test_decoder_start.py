"""A run that starts from a text decoder runs it as transformers does."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.model.text_decoder import write_text_decoder
from vllm_wsi.training.settings import LoraSettings, ModelSettings
from vllm_wsi.training.start_model import start_model, with_lora

SIZES = {"feature_dim": 8, "scorer": {"kind": "patch", "hidden_size": 4}, "projector": {"hidden_size": 4}}


@pytest.fixture
def decoder_path(tmp_path):
    write_text_decoder(tmp_path / "decoder")
    return str(tmp_path / "decoder")


def test_no_token_sees_a_later_one(decoder_path):
    model, _ = start_model(ModelSettings(decoder=decoder_path, dtype="float32", **SIZES), seed=0)
    ids = torch.arange(2 * 12).view(2, 12)
    others = ids.clone()
    others[:, 8:] += 100
    for decoder in (model.language_model, with_lora(model.language_model, LoraSettings(r=2))):
        with torch.no_grad():
            logits, of_others = (
                decoder(input_ids=one, attention_mask=torch.ones_like(ids)).logits for one in (ids, others)
            )
        assert torch.equal(logits[:, :8], of_others[:, :8])
        assert not torch.allclose(logits[:, 8:], of_others[:, 8:])


def test_its_logits_are_those_of_the_decoder_alone(decoder_path):
    model, _ = start_model(ModelSettings(decoder=decoder_path, dtype="float32", **SIZES), seed=0)
    alone = AutoModelForCausalLM.from_pretrained(decoder_path, dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found, wanted = (decoder(input_ids=ids).logits for decoder in (model.language_model, alone))
    torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_way_of_attention_that_a_decoder_was_loaded_with_stays(decoder_path, implementation):
    from vllm_wsi.model.config import SparseWSIConfig

    decoder = AutoModelForCausalLM.from_pretrained(decoder_path, attn_implementation=implementation)
    SparseWSIConfig(text_config=decoder.config, **SIZES)
    assert decoder.config._attn_implementation == implementation


def test_the_way_of_experts_that_a_decoder_was_loaded_with_stays(decoder_path):
    from vllm_wsi.model.config import SparseWSIConfig

    decoder = AutoModelForCausalLM.from_pretrained(decoder_path)
    decoder.config._experts_implementation = "eager"
    SparseWSIConfig(text_config=decoder.config, **SIZES)
    assert decoder.config._experts_implementation == "eager"
