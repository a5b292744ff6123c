"""A server started as the pages say, without our test settings: the profile run, compilation, no allowed path."""

import base64

import openai
import pytest

from vllm_wsi.serving.server_process import ServerError, VllmServer

from .conftest import make_slide, slide_message

pytestmark = pytest.mark.server


def test_a_server_without_an_allowed_path_profiles_compiles_and_refuses_files(checkpoint, tmp_path):
    # Without --enforce-eager and VLLM_CPU_KVCACHE_SPACE the worker profiles itself with dummy slides.
    env = dict.fromkeys(("VLLM_CPU_KVCACHE_SPACE", "TORCH_COMPILE_DISABLE", "VLLM_ENABLE_V1_MULTIPROCESSING"))
    args = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--gpu-memory-utilization", "0.3"]
    slide = make_slide(tmp_path / "a.safetensors", 100)
    with VllmServer(checkpoint, None, tmp_path / "server.log", args, env) as server:
        assert "profiled with 8 image items" in server.log_path.read_text()
        client = openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=120)

        def ask(url):
            return client.chat.completions.create(
                model=server.model, messages=slide_message(url), max_tokens=4, temperature=0
            )

        with pytest.raises(openai.BadRequestError, match="without --allowed-local-media-path"):
            ask(slide.as_uri())
        data = base64.b64encode(slide.read_bytes()).decode()
        assert ask(f"data:application/octet-stream;base64,{data}").usage.completion_tokens == 4


def test_an_unknown_plugin_ends_the_start_with_the_installed_names(checkpoint, tmp_path):
    with pytest.raises(ServerError, match=r"unknown plugin 'nosuch'\. Installed vLLM plugins: .*vllm_wsi"):
        VllmServer(checkpoint, None, tmp_path / "server.log", ["--plugin", "nosuch"])
