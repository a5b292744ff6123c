"""A decoder of any size without its download: `init-checkpoint --text-config`, served with `--load-format dummy`."""

import json

import openai
import pytest

from vllm_wsi.cli.app import main
from vllm_wsi.serving.server_process import VllmServer

from .conftest import D, make_slide, slide_message

pytestmark = pytest.mark.server

# Twice as many tokens as the byte tokenizer knows: random weights answer with those that it does not.
TEXT_CONFIG = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 640, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
}  # fmt: skip


def test_a_shape_without_weights_is_served_and_selects_with_its_own_scorer(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TEXT_CONFIG))
    out = tmp_path / "shape"
    assert main(["init-checkpoint", str(out), "--feature-dim", str(D), "--text-config", str(config)]) == 0
    slide = make_slide(tmp_path / "a.safetensors", 3000)
    args = ["--load-format", "dummy", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    with VllmServer(out, tmp_path, tmp_path / "server.log", args) as server:
        with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=120) as client:
            answer = client.chat.completions.create(
                model=server.model,
                messages=slide_message(slide.as_uri()),
                max_tokens=16,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
        assert answer.usage.completion_tokens == 16
        assert answer.usage.prompt_tokens > 32
        assert server.metrics()["vllm_wsi:selections_total"] == 1
