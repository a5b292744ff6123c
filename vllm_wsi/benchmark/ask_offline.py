"""Asks vLLM in this process the questions of an evaluation, without a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .prepared import PreparedQuestion
from .results import Row
from .runner import Evaluation

CHUNK = 64
"""Questions that the engine is handed at once; a run that is killed loses no more answers than these."""


def ask_offline(evaluation: Evaluation, checkpoint: str, engine_args: Mapping[str, Any]) -> None:
    """Asks `vllm.LLM(checkpoint)` every arm's open questions; rows are on disk after each chunk.

    Args:
        engine_args: further arguments of `vllm.LLM`.
    """
    from vllm_wsi.serving.engine import OfflineEngine  # imports vLLM, which the other ways of asking do not need

    settings, root = evaluation.settings, str(evaluation.files.common_root)
    engine = OfflineEngine(checkpoint, **{"allowed_local_media_path": root, "seed": settings.seed, **engine_args})
    for arm in evaluation.arms:
        with evaluation.recorder(arm, checkpoint, "offline", {"vllm": engine.version}) as recorder:
            for start in range(0, len(recorder.todo), CHUNK):
                ready: list[PreparedQuestion] = []
                for question in recorder.todo[start : start + CHUNK]:
                    prepared = evaluation.prepare(question, arm)
                    if isinstance(prepared, Row):
                        recorder.record(prepared)
                    else:
                        ready.append(prepared)
                responses = engine.complete([one.request(checkpoint, settings.max_tokens) for one in ready])
                for one, response in zip(ready, responses, strict=True):
                    recorder.record(one.responded(response))
