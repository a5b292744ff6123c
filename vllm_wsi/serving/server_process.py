"""Starts a real `vllm serve` as a child, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from vllm_wsi.errors import SetupError

START_SECONDS = 300
STOP_SECONDS = 30


class ServerError(SetupError):
    """The server did not start; the message ends with the last lines of its log."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class VllmServer:
    """`vllm serve CHECKPOINT --plugin vllm_wsi` on a free port of this machine.

    Args:
        checkpoint: directory.
        media_path: `--allowed-local-media-path`; None: file URLs are refused.
        args: further arguments of `vllm serve`.
        env: further environment; None takes a variable away.
        log_path: where the server's output goes.
        on_wait: called about once a second with the seconds waited so far.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        media_path: str | Path | None,
        log_path: str | Path,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.model = str(checkpoint)
        self.log_path = Path(log_path)
        self.port = free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model, "--plugin", "vllm_wsi"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        if media_path is not None:
            command += ["--allowed-local-media-path", str(media_path)]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ, **(env or {})}
        environment = {name: value for name, value in settings.items() if value is not None}
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                [*command, *args], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            self._wait(on_wait)
        except BaseException:
            self.stop()
            raise

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def api(self) -> str:
        return f"{self.root}/v1"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def metrics(self) -> dict[str, float]:
        """Sums of the server's Prometheus samples by name, over all labels."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self.metrics_text()):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def metrics_text(self) -> str:
        with urllib.request.urlopen(f"{self.root}/metrics", timeout=10) as answer:
            return answer.read().decode()

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def terminate(self, seconds: float = STOP_SECONDS) -> int:
        """SIGTERM to the parent alone, as a supervisor sends it; returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it has not ended within so many seconds.
        """
        os.kill(self.pid, signal.SIGTERM)
        return self._process.wait(seconds)

    def stop(self) -> None:
        """Ends the server and every process it started."""
        if self.is_alive:
            os.killpg(self.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self, on_wait: Callable[[float], None]) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            if not self.is_alive:
                raise ServerError(f"vllm serve ended with {self._process.returncode}:\n{self.log_tail()}")
            try:
                urllib.request.urlopen(f"{self.root}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                on_wait(time.monotonic() - began)
                time.sleep(0.5)
        raise ServerError(f"vllm serve did not answer within {START_SECONDS} s:\n{self.log_tail()}")
