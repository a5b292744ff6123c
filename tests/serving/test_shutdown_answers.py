"""SIGTERM to the parent of a real `vllm serve`, as a supervisor sends it, while requests are under way."""

import collections
import concurrent.futures
import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.serving.server_process import VllmServer

from .conftest import D, make_slide, slide_message

pytestmark = pytest.mark.server
ENDS_WITHIN = 10  # seconds, of which uvicorn may wait five for clients that do not read
CLIENT_WAITS = 60  # longer than that: a request without an answer is a failure


class Clients(concurrent.futures.ThreadPoolExecutor):
    """Clients that each want a long answer. They share one `httpx.Client`: to make one takes longer than a request."""

    def __init__(self, server, number):
        super().__init__(number)
        self._server, self.streaming = server, threading.Semaphore(0)
        self._http = httpx.Client(timeout=CLIENT_WAITS, limits=httpx.Limits(max_connections=number))

    def __exit__(self, *error):
        super().__exit__(*error)
        self._http.close()

    def ask(self, stream, content="Tell me about it."):
        """Future of a status, of «cut» where the connection closed within an answer, or of «refused»."""
        return self.submit(self._ask, stream, content)

    def _ask(self, stream, content):
        body = {"model": self._server.model, "max_tokens": 1900, "ignore_eos": True, "stream": stream}
        body["messages"] = [{"role": "user", "content": content}]
        try:
            with self._http.stream("POST", f"{self._server.api}/chat/completions", json=body) as answer:
                for _ in answer.iter_raw():
                    if stream:
                        self.streaming.release()
                return answer.status_code
        except (httpx.RemoteProtocolError, httpx.ReadError):
            return "cut"
        except httpx.ConnectError:
            return "refused"  # it came too late


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A decoder of 26 million parameters. Where a step takes less time than handing out its tokens, as with those of
    other tests, the API server falls behind the engine and hears nobody until all answers are made.
    """
    path = tmp_path_factory.mktemp("checkpoint") / "qwen2"
    init_checkpoint(path, TinySettings(feature_dim=D, hidden_size=512, num_layers=8, scorer_hidden_size=32))
    return path


@pytest.fixture
def short_path():
    """vLLM's sockets lie in TMPDIR, and their names may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="wsi-") as folder:
        yield Path(folder)


def test_every_client_is_answered_and_nothing_stays(checkpoint, short_path):
    args = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "32"]
    path = os.pathsep.join([str(Path(__file__).parent / "process_start"), os.environ.get("PYTHONPATH", "")])
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TMPDIR": str(short_path), "PYTHONPATH": path}
    held = make_slide(short_path / "held.safetensors", 100)
    Path(f"{held}.hold").touch()  # its rows cannot be read, as on a mount that does not answer
    with VllmServer(checkpoint, short_path, short_path / "server.log", args, env) as server:
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address), socket.create_connection(address) as half:
            half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            with Clients(server, 22) as clients:
                slides = [clients.ask(False, slide_message(held.as_uri())[0]["content"]) for _ in range(2)]
                deadline = time.monotonic() + CLIENT_WAITS
                while server.metrics().get("vllm_wsi:selections_joined_total", 0) < 1:  # both wait for its rows
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                parent = psutil.Process(server.pid)
                processes = [parent, *parent.children(recursive=True)]
                shared = {Path(part.path) for process in processes for part in process.memory_maps()}
                shared = {path for path in shared if path.parent == Path("/dev/shm") and path.exists()}
                asked = [clients.ask(False) for _ in range(16)]
                deadline = time.monotonic() + CLIENT_WAITS
                while (running := server.metrics().get("vllm:num_requests_running", 0)) < 12:
                    assert time.monotonic() < deadline, f"{running} run: {server.log_tail()}"
                    time.sleep(0.05)
                asked += [clients.ask(True) for _ in range(4)]
                assert clients.streaming.acquire(timeout=CLIENT_WAITS)  # the answers are being made
                began = time.monotonic()
                os.kill(server.pid, signal.SIGTERM)
                assert server.terminate(CLIENT_WAITS) == 0, server.log_tail()  # the second SIGTERM changes nothing
                assert time.monotonic() - began < ENDS_WITHIN, server.log_tail()
                answers = collections.Counter(client.result() for client in asked)
            assert [client.result() for client in slides] == [503, 503]
            assert half.recv(100).startswith(b"HTTP/1.1 503")
    assert set(answers) <= {200, 503, "cut", "refused"}, answers
    assert answers[503] > 0, answers
    alive = psutil.wait_procs(processes, timeout=10)[1]
    assert [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert list(short_path.glob("vllm-wsi-*")) == []
    assert [path for path in shared if path.exists()] == []
