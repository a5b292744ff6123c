"""Real vLLM for the serving tests: checkpoints, slides, engines in this process, a server."""

import os

# In-process engines on a small machine; read when vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# vLLM compiles its log-probability sampler on first use, which takes half a minute and changes nothing here.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openai
import pytest

from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.slides import write_features

D = 48
KEY = "s3cret"  # of `shared_server`


def make_slide(path, n, seed=0, d=D, dtype="float32"):
    """A feature file of n random patches; returns its path."""
    features = np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)
    coords = np.stack([np.arange(n) * 256, np.arange(n) // 7], axis=1)
    write_features(path, features, coords, {"slide_id": path.stem, "encoder": "test@1"})
    return path


def slide_message(*urls, question="What is it?"):
    """One user turn: the slides first, the question after them."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small qwen2 checkpoint with original positions, for the features of `make_slide`."""
    path = tmp_path_factory.mktemp("checkpoint") / "qwen2"
    init_checkpoint(path, TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=32, encoder="test@1"))
    return path


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """What `shared_server` may read: every file of tests has a folder of its own in it."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def s3():
    """(client of a real S3 server with the bucket `slides`, the server's address).

    In a process of its own: vLLM looks at every object of every module, and those of Flask do not stand that.
    """
    import boto3  # a second to import, which other tests need not wait for

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address, account = f"http://127.0.0.1:{port}", {"aws_access_key_id": "id", "aws_secret_access_key": "secret"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            until = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < until:
                time.sleep(0.1)
            client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **account)
            client.create_bucket(Bucket="slides")
            yield client, address
        finally:
            server.kill()


def s3_environment(address):
    """Of a server that reads objects there."""
    account = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    return account | {"AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true"}


@pytest.fixture(scope="session")
def shared_server(checkpoint, shared_folder, s3, tmp_path_factory):
    """One `vllm serve` with an API key for all tests that take it as it is, since a start costs a minute.

    FILE.hold beside a FILE keeps its rows from being read. The counters go on from file to file: only their
    differences say something. What stalls, kills or configures a server starts its own.
    """
    log = tmp_path_factory.mktemp("log") / "server.log"
    args = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16"]
    args += ["--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 2}', "--api-key", KEY]
    args += ["--enable-lora", "--max-lora-rank", "8", "--allowed-media-domains", "127.0.0.1", "s3://slides"]
    path = os.pathsep.join([str(Path(__file__).parent / "process_start"), os.environ.get("PYTHONPATH", "")])
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "PYTHONPATH": path}
    env |= s3_environment(s3[1])
    with VllmServer(checkpoint, shared_folder, log, args, env) as running:
        yield running


@pytest.fixture
def client(shared_server):
    """The official client, which asks once."""
    with openai.OpenAI(base_url=shared_server.api, api_key=KEY, max_retries=0, timeout=120) as client:
        yield client
