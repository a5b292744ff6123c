"""A real Ray cluster on this machine: a head that does no work, and nodes of one core, each of which can be killed."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from ray.util import get_node_ip_address

HOOKS = Path(__file__).parent / "process_start"
QUICK = {  # verdicts on a lost node in a second or two
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
OF_VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}


class Node:
    """`ray start --block`, which ends all its processes with itself."""

    def __init__(self, folder: Path, name: str, *args: str) -> None:
        path = os.pathsep.join([str(HOOKS), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, **QUICK, **OF_VLLM, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        self._log = folder / f"{name}.log"
        with open(self._log, "wb") as log:
            command = [*ray, f"--node-name={name}", "--object-store-memory=80000000", *args]
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def pid(self, program: str) -> int:
        """Of its `raylet` or `gcs_server`."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        (found,) = [child.pid for child in children if child.name() == program]
        return found

    def kill(self, program: str = "raylet") -> None:
        os.kill(self.pid(program), signal.SIGKILL)

    def stop(self) -> None:
        if self._process.poll() is None:
            parent = psutil.Process(self._process.pid)
            family = [parent, *parent.children(recursive=True)]
            self._process.terminate()
            for process in psutil.wait_procs(family, timeout=5)[1]:  # a node without its head waits for it
                process.kill()
        self._process.wait()


class SmallCluster:
    """A head without cores, and the nodes that are added to it."""

    def __init__(self, port: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets have names of at most 107 characters
        self.address = f"{get_node_ip_address()}:{port}"  # by which a command here finds the head's own node
        head = [
            "--head",
            "--node-ip-address=127.0.0.1",
            f"--port={port}",
            "--num-cpus=0",
            "--include-dashboard=false",
            f"--temp-dir={self._folder}",
        ]
        self.head = Node(self._folder, "head", *head)
        self.nodes: list[Node] = []
        self._added = 0

    def add(self) -> Node:
        self._added += 1
        # Of another IP address, as else a command might speak to the cluster through this node, and be lost with it.
        where = [f"--address={self.address}", f"--node-ip-address=127.0.0.{1 + self._added}"]
        node = Node(self._folder, f"node{self._added}", *where, "--num-cpus=1")
        self.nodes.append(node)
        return node

    def stop(self) -> None:
        for node in (*self.nodes, self.head):
            node.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
