"""Decoders of many families with random weights answer in vLLM as in transformers; what cannot work is refused."""

import pytest
from transformers import AutoTokenizer

from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.init_checkpoint import init_shape
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.tiny_settings import SlideSettings

from .conftest import D, make_slide
from .test_parity import ask_transformers, ask_vllm, start_engine

pytestmark = pytest.mark.engine
SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "head_dim": 32, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
FAMILIES = {
    "mistral": ("MistralForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 4096}),
    "gemma3_text": ("Gemma3ForCausalLM", {"sliding_window": 4096}),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 0}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS),
    "granite": ("GraniteForCausalLM", {}),
}
STATEFUL = {
    "qwen3_next": ("Qwen3NextForCausalLM", EXPERTS | {"decoder_sparse_step": 1}),
    "mamba2": ("Mamba2ForCausalLM", {"state_size": 16, "num_heads": 8, "n_groups": 1}),
    "jamba": ("JambaForCausalLM", {"num_experts": 2}),
}


def write_shape(folder, family, architecture, more):
    init_shape(
        folder, SlideSettings(feature_dim=D, scorer_hidden_size=16),
        SHAPE | more | {"model_type": family, "architectures": [architecture]},
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_in_vllm_as_in_transformers(family, tmp_path):
    write_shape(tmp_path / "c", family, *FAMILIES[family])
    config = SparseWSIConfig.from_pretrained(tmp_path / "c", attn_implementation="eager")  # sdpa caps no logits
    model = SparseWSIForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "c")
    slides = [make_slide(tmp_path / f"{n}.safetensors", n, seed=n) for n in (5, 700)]
    tokenizer, llm = AutoTokenizer.from_pretrained(tmp_path / "c"), start_engine(tmp_path / "c", tmp_path)
    for paths in ([slides[0]], slides):
        wanted, logprobs = ask_transformers(model, tokenizer, paths, "Which tissue?")
        found, top = ask_vllm(llm, paths, "Which tissue?")
        assert found == wanted
        assert all(abs(value - logprobs[token].item()) < 1e-3 for token, value in top.items())


@pytest.mark.parametrize("family", STATEFUL)
def test_a_decoder_with_a_state_of_its_own_ends_the_start_with_one_sentence(family, tmp_path):
    write_shape(tmp_path / "c", family, *STATEFUL[family])
    with pytest.raises(Exception, match=f"decoder: found {STATEFUL[family][0]}, which keeps a state beside attention"):
        start_engine(tmp_path / "c", tmp_path, load_format="dummy")
