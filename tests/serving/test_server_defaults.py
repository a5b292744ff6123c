"""A server started as the README says, without our test settings: the profile run, compilation, no allowed path."""

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


def test_two_api_servers_give_one_answer_and_one_table_of_counters(checkpoint, tmp_path):
    args = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"]
    args += ["--api-server-count", "2"]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    slide = make_slide(tmp_path / "a.safetensors", 3000)
    with VllmServer(checkpoint, tmp_path, tmp_path / "server.log", args, env) as server:
        answers = set()
        for _ in range(12):  # a new connection each time: the kernel deals them out to the two servers
            with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=120) as client:
                answer = client.chat.completions.create(
                    model=server.model, messages=slide_message(slide.as_uri()), max_tokens=4, temperature=0
                )
                answers.add(answer.choices[0].message.content)
        assert len(answers) == 1
        metrics = server.metrics()
        assert metrics["vllm_wsi:selection_device"] == 2
        log = server.log_path.read_text()
        assert log.count("slides are scored on the CPU: PyTorch finds no CUDA device") == 2
        selections = metrics["vllm_wsi:selections_total"]
        assert selections in (1, 2)  # each server selects for itself
        assert metrics["vllm_wsi:selection_cache_hits_total"] == 12 - selections


def test_an_unknown_plugin_ends_the_start_with_the_installed_names(checkpoint, tmp_path):
    with pytest.raises(ServerError, match=r"unknown plugin 'nosuch'\. Installed vLLM plugins: .*vllm_wsi"):
        VllmServer(checkpoint, None, tmp_path / "server.log", ["--plugin", "nosuch"])
