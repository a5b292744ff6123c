"""The real language model as a plain checkpoint: weights, tokenizer, template."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_wsi.parts.smollm2 import decoder_folder, resolve_decoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def decoder(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def test_it_is_bfloat16_with_grouped_heads_and_one_tied_embedding(smollm2, decoder):
    config = decoder.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49152)
    assert not hasattr(config, "quantization_config")
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    with safe_open(smollm2 / "model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
        assert {tensors.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert "lm_head.weight" not in names


def test_it_answers_in_a_sentence_and_ends_its_turn(decoder, tokenizer):
    ask = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = decoder.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
    assert answer[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "Paris" in tokenizer.decode(answer)


def test_each_digit_is_a_token_of_its_own_and_spaces_before_it_stay_together(tokenizer):
    def tokens(text):
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))

    assert tokens("in 2014") == ["in", "Ġ", "2", "0", "1", "4"]
    assert tokens("x  1") == ["x", "ĠĠ", "1"]  # without the split of digits: two tokens of one space
    assert tokenizer.decode(tokenizer.encode("é 日本 3.5 %\n\n  x")) == "é 日本 3.5 %\n\n  x"


def test_its_template_begins_with_a_default_system_prompt_unless_there_is_one(tokenizer):
    def render(*messages):
        return tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages], add_generation_prompt=True, tokenize=False
        )

    assert render(("user", "x")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(("system", "s"), ("user", "x")).startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user")


def test_settings_name_it_by_its_name_and_others_by_theirs(smollm2):
    assert resolve_decoder("SmolLM2-135M-Instruct") == str(smollm2)
    assert resolve_decoder("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"


def test_a_second_call_converts_nothing(smollm2):
    before = (smollm2 / "model.safetensors").stat()
    assert decoder_folder() == smollm2
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
