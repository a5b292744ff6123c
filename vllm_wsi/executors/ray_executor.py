"""A work with many items by the workers of a Ray cluster (extra: ray), as `LocalExecutor` does it on one machine.

A worker is an actor of Ray: one process on some node, which loads what it needs once and does one item at a time. Why
an actor ended is told apart here, because Ray does not do so in its errors (`ray/exceptions.py`; Ray 2.60):

- `RayTaskError`: the item's own exception, which is its `cause`. The actor lives.
- `ActorDiedError`: the actor is dead for good (`max_restarts` is 0). Of what the head knows about it
  (`ActorDiedErrorContext`) the error keeps one flag, `preempted` (an autoscaler drained the node), and words. The head
  learns that a process ended from its node, and that a node ended from its own health checks, and only then declares
  the node's actors dead. So where the node of a dead actor is alive, the item ended its process: it is tried once
  more, first of all by a new worker, and then given up. Where the node is dead, others do the item, however often.
- `ActorUnavailableError`: the connection to the actor broke a second ago and nobody knows yet why. The next call to
  the same actor tells: it is answered, or fails with `ActorDiedError` once the head's health checks have a verdict.
- `ObjectLostError`: the item was done, but what came of it was lost with its node. Others do it again.
- Any other `RayError`, as `OutOfMemoryError`: as if the item had ended its process.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Generic

from vllm_wsi.errors import SettingsError, SetupError

from .executor import Item, Result, Work
from .ray_cluster import KEPT, RayCluster, ray_cluster, size_in_words
from .ray_worker import RayWorker, WorkerStart

CHECK_SECONDS = 5
"""Without an answer of any worker, after which it is looked whether the cluster is there."""
logger = logging.getLogger(__name__)


@contextmanager
def ray_executor(address: str, workers: int | None = None, shared: Path | None = None) -> Iterator[RayExecutor]:
    """Connects to a cluster for the time of the `with`.

    Args:
        address: HOST:PORT of its head, or "auto".
        workers: None: as many as fit beside what else runs there.
        shared: folder into which the workers write, which must be the same on all nodes; made where it is not there.

    Raises:
        SettingsError: another address.
        SetupError: Ray is not installed, or no cluster answers there.
    """
    with ray_cluster(address) as cluster:
        if shared is None:
            yield RayExecutor(cluster, workers)
            return
        shared.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=shared, prefix=".seen-by-all-nodes.") as mark:
            yield RayExecutor(cluster, workers, Path(mark.name).absolute())


class RayExecutor:
    """Workers on the nodes of a cluster, one for each free CPU, or for each free GPU where the work is for GPUs.

    Args:
        workers: None: as many as fit beside what else runs there.
        mark: a file that every node must see; None: none.
    """

    def __init__(self, cluster: RayCluster, workers: int | None = None, mark: Path | None = None) -> None:
        self._cluster, self._workers, self._mark = cluster, workers, mark

    def device_here(self, device: str) -> str:
        """As `Executor.device_here`: a GPU is for the workers, and seldom where the command runs."""
        return "cpu"

    def device_there(self, device: str) -> str:
        """As `Executor.device_there`.

        Raises:
            SettingsError: one GPU of several is named.
            SetupError: a GPU is wanted, and no node has one.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise SettingsError(f"--device: found {device!r}, wanted auto, cpu or cuda: Ray gives each worker its GPU")
        has_gpu = any(node.get("GPU") for node in self._cluster.nodes().values())
        if device == "cuda" and not has_gpu:
            raise SetupError(f"{self._cluster.name}: found no node with a GPU, wanted one, or --device cpu")
        return device if has_gpu else "cpu"

    def run(self, work: Work[Item, Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | None]]:
        """As `Executor.run`. An item's first worker may have done it before its node was lost: it is done again.

        Raises:
            SetupError: no worker starts, or the cluster is lost.
        """
        gpus = work.gpus if work.device != "cpu" else 0
        nodes = self._cluster.nodes().values()
        cpus = min((cpus for node in nodes if (cpus := node.get("CPU"))), default=1.0) if work.takes_node else 1.0
        size = cpus if not gpus else 1.0, gpus
        most = self._cluster.most_workers(*size)
        if not most:
            raise SetupError(f"{self._cluster.name}: found no node that has {size_in_words(size)}, wanted one")
        limit = min(self._workers or most, work.most_workers or most)
        yield from _Run(self._cluster, WorkerStart.of(work, self._mark), items, size, limit).ended()


@dataclass
class _Job(Generic[Item]):
    """An item that is to be done."""

    item: Item
    is_suspect: bool = False  # it may have ended a worker


class _Queue(Generic[Item]):
    """What waits for a worker."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._new = iter(items)
        self._waiting: deque[_Job[Item]] = deque()
        self._suspects: deque[_Job[Item]] = deque()

    def put_back(self, job: _Job[Item]) -> None:
        (self._suspects if job.is_suspect else self._waiting).appendleft(job)

    def take(self, is_new: bool) -> _Job[Item] | None:
        """For a worker; a new one takes a suspect first, others take none."""
        if is_new and self._suspects:
            return self._suspects.popleft()
        return self._waiting.popleft() if self.waiting(1, suspects=False) else None

    def waiting(self, most: int, suspects: bool = True) -> int:
        """How many wait, at most `most`; `items` are asked for no more than these."""
        found = len(self._suspects) if suspects else 0
        while found + len(self._waiting) < most:
            try:
                self._waiting.append(_Job(next(self._new)))
            except StopIteration:
                break
        return min(most, found + len(self._waiting))


@dataclass(eq=False)
class _Worker(Generic[Item]):
    """An actor and what it does; it starts as long as its node is not known."""

    actor: Any
    where: Any  # the call that tells its node
    node: str | None = None
    job: _Job[Item] | None = None
    is_new: bool = True  # it has begun no item
    is_asked: bool = False  # whether it lives


class _Run(Generic[Item]):
    """One work with its workers, of which `limit` run at once."""

    def __init__(
        self, cluster: RayCluster, told: WorkerStart, items: Iterable[Item], size: tuple[float, float], limit: int
    ) -> None:
        import ray

        self._cluster, self._queue, self._size, self._limit = cluster, _Queue(items), size, limit
        self._told = ray.put(told)
        options = {"num_cpus": size[0], "num_gpus": size[1], "max_restarts": 0, "max_task_retries": 0}
        self._actor: Any = ray.remote(RayWorker).options(**options, scheduling_strategy="SPREAD")
        self._busy: dict[Any, _Worker[Item]] = {}  # by the call that is under way
        self._idle: list[_Worker[Item]] = []
        self._said_full = False

    def ended(self) -> Iterator[tuple[Item, Any]]:
        """(item, what came of it) as each ends."""
        import ray

        try:
            while self._hand_out():
                calls, _ = ray.wait(list(self._busy), timeout=CHECK_SECONDS)
                if not calls:
                    self._look_at_cluster()
                for call in calls:
                    yield from self._answered(self._busy.pop(call), call)
        finally:
            if not self._cluster.is_lost:  # else this would wait for it
                for worker in (*self._busy.values(), *self._idle):
                    ray.kill(worker.actor)

    def _hand_out(self) -> int:
        """Gives idle workers what waits, ends those for which nothing does, and starts new ones; returns the busy."""
        import ray

        for worker in self._idle:
            worker.job = self._queue.take(worker.is_new)
            if worker.job is None:
                ray.kill(worker.actor)  # a new one may need its place
            else:
                worker.is_new = False
                self._busy[worker.actor.do.remote(worker.job.item)] = worker
        self._idle = []
        starting = sum(worker.node is None for worker in self._busy.values())
        while len(self._busy) < self._limit and starting < self._queue.waiting(self._limit):
            actor = self._actor.remote()
            where = actor.node.remote()
            self._busy[actor.start.remote(self._told)] = _Worker(actor, where)
            starting += 1
        return len(self._busy)

    def _answered(self, worker: _Worker[Item], call: Any) -> Iterator[tuple[Item, Any]]:
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayError, RayTaskError

        job = worker.job
        try:
            found = ray.get(call)
            worker.node = worker.node or ray.get(worker.where)
        except ActorUnavailableError:
            if job is None:  # perhaps it never heard what to load
                self._busy[worker.actor.start.remote(self._told)] = worker
            else:
                worker.is_asked = True
                self._busy[worker.actor.node.remote()] = worker
        except RayTaskError as error:
            ray.kill(worker.actor)
            if job is not None:
                raise error.cause from None  # as a pool of processes raises it
            self._failed_start(error.cause)
        except RayError as error:
            ray.kill(worker.actor)
            is_node_lost = isinstance(error, ObjectLostError) or (
                isinstance(error, ActorDiedError) and (error.preempted or self._is_node_lost(worker))
            )
            if is_node_lost:
                logger.warning("--ray: found a node that is lost; others do what it had")
            if job is None:
                if not is_node_lost:
                    self._failed_start(error)
            elif is_node_lost or not job.is_suspect:
                job.is_suspect |= not is_node_lost
                self._queue.put_back(job)
            else:
                yield job.item, None
        else:
            worker.job = None
            self._idle.append(worker)
            if worker.is_asked and job is not None:
                self._queue.put_back(job)  # it was begun, and its answer did not come through
            elif job is not None:
                yield job.item, found
            worker.is_asked = False

    def _is_node_lost(self, worker: _Worker[Item]) -> bool:
        import ray
        from ray.exceptions import RayError

        try:
            node = worker.node or ray.get(worker.where, timeout=0)
        except RayError:  # it died before it could tell
            return False
        return node not in self._cluster.nodes()

    def _failed_start(self, error: BaseException) -> None:
        """Does without this worker: the next one might be put on the same node, again and again."""
        reason = " ".join(str(error).split())
        self._limit -= 1
        if not self._limit:
            raise SetupError(f"{self._cluster.name}: found no worker that starts ({reason}), wanted one; {KEPT}")
        logger.warning("--ray: found a worker that does not start, and go on without it: %s", reason)

    def _look_at_cluster(self) -> None:
        most = self._cluster.most_workers(*self._size)
        if any(worker.node is not None for worker in self._busy.values()):
            return
        wanted = size_in_words(self._size)
        if not most:
            raise SetupError(f"{self._cluster.name}: found no node left that has {wanted}, wanted one; {KEPT}")
        if not self._said_full and not self._cluster.has_free(*self._size):
            logger.info("--ray: waiting for %s: others have all that the cluster has", wanted)
            self._said_full = True
