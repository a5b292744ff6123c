"""A Ray cluster that runs already (extra: ray): the connection to it, its nodes, and whether it still answers."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from vllm_wsi.errors import SettingsError, SetupError, needs_extra

ANSWER_SECONDS = 5
"""In which the head of a cluster answers. Ray itself would try for minutes."""
LOST_SECONDS = 20
"""After which a head that no longer answers is given up; after 60, Ray itself would end the process."""
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
"""With which every client of gRPC begins; the server's first frame is of the kind SETTINGS, too."""
SETTINGS_FRAME = 4
KEPT = "what is done is kept, and the same command goes on"
# Read when Ray is imported: it reports nothing to its makers, copies no folder to the nodes where `uv run` started this
# process, and does not warn of a change to workers without a GPU, who are told their device here.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class RayCluster:
    """What is asked of a cluster.

    Args:
        address: as the user names it.
        head: (host, port) of its global control store, which knows nodes and workers.
        own_node: id of the node through which this process speaks to it.
    """

    def __init__(self, address: str, head: tuple[str, int], own_node: str) -> None:
        self.name, self._head, self._own_node, self.is_lost = f"--ray {address}", head, own_node, False

    def nodes(self) -> dict[str, Mapping[str, float]]:
        """Id -> CPU, GPU and other resources, free or not, of each node that is alive.

        Raises:
            SetupError: the cluster no longer answers, or has lost the node through which this process speaks to it.
        """
        import ray

        until = time.monotonic() + LOST_SECONDS
        while not _answers(*self._head):  # else Ray's own calls would stand still
            if time.monotonic() < until:
                time.sleep(1)
                continue
            self.is_lost = True
            raise SetupError(f"{self.name}: found a cluster that no longer answers, wanted it; {KEPT}")
        alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        if self._own_node not in alive:
            self.is_lost = True
            raise SetupError(f"{self.name}: found that the node of this machine is lost, wanted it; {KEPT}")
        return alive

    def most_workers(self, cpus: float, gpus: float) -> int:
        """How many workers of that size its nodes hold beside what else runs there, at least one; 0: none has room.

        Raises:
            SetupError: the cluster no longer answers.
        """
        whole = sum(_fitting(node, cpus, gpus) for node in self.nodes().values())
        return min(whole, max(1, self._free(cpus, gpus)))

    def has_free(self, cpus: float, gpus: float) -> bool:
        """Whether a worker of that size could begin now."""
        return self._free(cpus, gpus) > 0

    def _free(self, cpus: float, gpus: float) -> int:
        import ray

        return _fitting(ray.available_resources(), cpus, gpus)


def _fitting(resources: Mapping[str, float], cpus: float, gpus: float) -> int:
    wanted = {"CPU": cpus, "GPU": gpus}
    return min(int(resources.get(name, 0) // number) for name, number in wanted.items() if number)


def size_in_words(size: tuple[float, float]) -> str:
    """(CPUs, GPUs) of a worker, as messages name them."""
    return " and ".join(f"{number:g} {name}" for number, name in zip(size, ("CPU", "GPU"), strict=True) if number)


@contextmanager
def ray_cluster(address: str) -> Iterator[RayCluster]:
    """The connection of this process to a cluster that runs already; none is ever started.

    Args:
        address: HOST:PORT of the head, or "auto": RAY_ADDRESS, or the one of which this machine is a node.

    Raises:
        SettingsError: another address.
        SetupError: Ray is not installed, or no cluster answers there.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    named = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    head = re.fullmatch(r"(?P<host>[\w.-]+|\[[\da-fA-F:]+\]):(?P<port>\d{1,5})", named)
    if head is None and named != "auto":
        raise SettingsError(f"--ray: found {named!r}, wanted HOST:PORT of a cluster's head, or auto")
    with needs_extra("ray"):
        import ray
        import ray._private.worker
    # Ray prints what its nodes tell, a page for each worker that ends, however it is asked to log.
    ray._private.worker._worker_logs_enabled = False
    if head is not None and not _answers(head["host"], int(head["port"])):
        raise SetupError(f"--ray {address}: found no Ray cluster that answers at {named}, wanted one that runs")
    try:
        ray.init(named, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        reason = str(error).partition("\n")[0]
        raise SetupError(
            f"--ray {address}: found no way to join a cluster ({reason}), wanted one that runs, and of which this "
            "machine is a node; see `ray start`"
        ) from error
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    cluster = RayCluster(address, (host, int(port)), context.get_node_id())
    try:
        yield cluster
    finally:
        ray.shutdown()


def _answers(host: str, port: int) -> bool:
    """Whether a server of gRPC is there; with RAY_USE_TLS, whether any is."""
    try:
        with socket.create_connection((host.strip("[]"), port), ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return True
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(HTTP2_HELLO)
            frame = connection.recv(9)
            return len(frame) > 3 and frame[3] == SETTINGS_FRAME
    except OSError:
        return False
