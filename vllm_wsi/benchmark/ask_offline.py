"""Asks vLLM the questions of an evaluation without a server: in this process, or in workers of a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_wsi.executors import Executor, LocalExecutor, Work

from .prepared import PreparedQuestion
from .recorder import Recorder
from .results import Row
from .runner import Evaluation

if TYPE_CHECKING:
    from vllm_wsi.serving.engine import OfflineEngine

CHUNK = 64
"""Questions that the engine is handed at once; a run that is killed loses no more answers than these of each engine."""
ENDED = "found no answer: the engine ended twice with these questions, wanted one"


class Shard(NamedTuple):
    """Questions that one engine is handed at once."""

    number: int
    bodies: list[dict[str, Any]]  # of the requests


def ask_offline(
    evaluation: Evaluation, checkpoint: str, engine_args: Mapping[str, Any], executor: Executor | None = None
) -> None:
    """Asks `vllm.LLM(checkpoint)` every arm's open questions; rows are on disk after each shard.

    Args:
        engine_args: further arguments of `vllm.LLM`.
        executor: None: one engine in this process.
    """
    from vllm_wsi.serving.engine import OfflineEngine  # imports vLLM, which the other ways of asking do not need

    root = str(evaluation.files.common_root)
    engine_args = {"allowed_local_media_path": root, "seed": evaluation.settings.seed, **engine_args}
    work: Work[Shard, list[dict[str, Any]]]
    if executor is None:
        executor, engine = LocalExecutor(1), OfflineEngine(checkpoint, **engine_args)
        work = Work(_ask, do_here=lambda shard: engine.complete(shard.bodies))
    else:
        # Several GPUs of one engine are of one node: outside a placement group vLLM leaves Ray alone.
        gpus = int(engine_args.get("tensor_parallel_size", 1)) * int(engine_args.get("pipeline_parallel_size", 1))
        device = executor.device_there("auto")
        work = Work(_ask, _start_engine, (checkpoint, engine_args), device=device, gpus=gpus, takes_node=True)
    asked: dict[int, tuple[Recorder, list[PreparedQuestion]]] = {}
    with ExitStack() as recorders:
        shards = _shards(evaluation, checkpoint, OfflineEngine.version, recorders, asked)
        for shard, responses in executor.run(work, shards):
            recorder, questions = asked.pop(shard.number)
            for index, one in enumerate(questions):
                recorder.record(one.failed(ENDED) if responses is None else one.responded(responses[index]))


def _shards(
    evaluation: Evaluation,
    checkpoint: str,
    version: str,
    recorders: ExitStack,
    asked: dict[int, tuple[Recorder, list[PreparedQuestion]]],
) -> Iterator[Shard]:
    """Of all arms; each is prepared when it is asked for, and stands in `asked` until it is answered."""
    numbers = count()
    for arm in evaluation.arms:
        recorder = recorders.enter_context(evaluation.recorder(arm, checkpoint, "offline", {"vllm": version}))
        for start in range(0, len(recorder.todo), CHUNK):
            ready: list[PreparedQuestion] = []
            for question in recorder.todo[start : start + CHUNK]:
                prepared = evaluation.prepare(question, arm)
                if isinstance(prepared, Row):
                    recorder.record(prepared)
                else:
                    ready.append(prepared)
            if ready:
                number = next(numbers)
                asked[number] = recorder, ready
                yield Shard(number, [one.request(checkpoint, evaluation.settings.max_tokens) for one in ready])


_worker_engine: OfflineEngine | None = None


def _start_engine(checkpoint: str, engine_args: Mapping[str, Any]) -> None:
    global _worker_engine
    # The engine runs in the worker's own process: what ends one of them ends both, and leaves nothing behind.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm_wsi.serving.engine import OfflineEngine

    _worker_engine = OfflineEngine(checkpoint, **engine_args)


def _ask(shard: Shard) -> list[dict[str, Any]]:
    assert _worker_engine is not None
    return _worker_engine.complete(shard.bodies)
