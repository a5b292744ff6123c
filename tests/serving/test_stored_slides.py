"""Servers over one selection store: a slide is read once, whichever API server, replica or restart is asked."""

import contextlib
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from vllm_wsi.cli.app import main
from vllm_wsi.serving.server_process import VllmServer

from .conftest import make_slide, slide_message

pytestmark = pytest.mark.server
ARGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8")
ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def start(checkpoint, folder, store, log, *args):
    options = ["--mm-processor-kwargs", json.dumps({"selection_store": str(store), "selection_store_gib": 1})]
    return VllmServer(checkpoint, folder, log, [*ARGS, *options, *args], ENV)


def ask(server, url):
    """On a connection of its own, so that any of the API servers may get it."""
    with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=120) as client:
        answer = client.chat.completions.create(
            model=server.model, messages=slide_message(url), max_tokens=6, temperature=0
        )
        return answer.choices[0].message.content


def events(server):
    """What the store did, by its name."""
    found = re.findall(r'^vllm_wsi:selection_store_events_total{event="([^"]+)"} (\S+)$', server.metrics_text(), re.M)
    return {event: float(value) for event, value in found}


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of its own."""
    folder = tmp_path / "store"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def answers_on_with_a_disk_that_fails(server, disk, tmp_path):
    """Full, then read-only, then gone: every new slide is answered, and the log says each fault once."""
    slides = [make_slide(tmp_path / f"late-{seed}.safetensors", 3000, seed=seed) for seed in range(20, 28)]
    urls = iter(path.as_uri() for path in slides)
    with contextlib.suppress(OSError), open(disk / "ballast", "wb") as file:
        while True:
            file.write(bytes(4096))
    assert all(ask(server, next(urls)) for _ in range(3))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert all(ask(server, next(urls)) for _ in range(2))
    subprocess.run(["umount", "-l", str(disk)], check=True)
    disk.rmdir()
    assert all(ask(server, next(urls)) for _ in range(3))
    said = re.findall(r"selection store \S+: (\w+) failed", server.log_path.read_text())
    assert said
    assert len(said) == len(set(said))
    assert events(server)["fault"] >= 8


def test_two_api_servers_and_a_replica_read_a_slide_once_and_then_no_row_of_it(checkpoint, tmp_path, disk):
    slides = [make_slide(tmp_path / f"{seed}.safetensors", 3000, seed=seed) for seed in range(3)]
    urls = [path.as_uri() for path in slides]
    store = disk or tmp_path / "a-store"
    with start(checkpoint, tmp_path, store, tmp_path / "a.log", "--api-server-count", "2") as server:
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda i: ask(server, urls[i % 3]), range(24)))
        assert all(answers[i] == answers[i % 3] for i in range(24))
        metrics = server.metrics()
        assert metrics["vllm_wsi:selections_total"] == 3
        assert metrics["vllm_wsi:patches_read_total"] == 9000
        # One table of counters for both.
        assert metrics["vllm_wsi:selection_device"] == 2
        assert server.log_path.read_text().count("slides are scored on the CPU: PyTorch finds no CUDA device") == 2
    warmed = make_slide(tmp_path / "warmed.safetensors", 3000, seed=9)
    assert main(["warm", str(warmed), "--checkpoint", str(checkpoint), "--store", str(store)]) == 0
    with start(checkpoint, tmp_path, store, tmp_path / "b.log") as replica:
        assert [ask(replica, url) for url in urls] == answers[:3]
        assert ask(replica, warmed.as_uri())
        sources = [httpx.post(f"{replica.api}/wsi/select", json={"url": urls[0]}).json()["source"] for _ in range(2)]
        other_k = httpx.post(f"{replica.api}/wsi/select", json={"url": f"{urls[0]}#k=40"}).json()
        heat_map = httpx.get(f"{replica.api}/wsi/heatmap.png", params={"url": urls[0], "patch_size_level0": 256})
        metrics, found = replica.metrics(), events(replica)
        if disk is not None:
            answers_on_with_a_disk_that_fails(replica, disk, tmp_path)
    assert sources == ["memory", "memory"]
    assert (other_k["source"], other_k["num_selected"]) == ("stored scores", 40)
    assert heat_map.status_code == 200, heat_map.text
    assert metrics["vllm_wsi:patches_read_total"] == 0
    assert (found["hit"], found["scores hit"]) == (4, 2)
