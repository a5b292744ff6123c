"""The same questions without a server: vLLM in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_wsi.errors import SlideError

from .ask_endpoint import needs_structure, read_answer, request_body
from .runner import Evaluation, Progress, answer_row, error_row, missing_row

CHUNK = 64
"""Questions handed to the engine at once; a killed run loses no more."""


def ask_offline(evaluation: Evaluation, checkpoint: str, engine_args: Mapping[str, Any]) -> None:
    """Asks every arm's open questions of `vllm.LLM(checkpoint)`; results are on disk after each chunk.

    Args:
        engine_args: further arguments of `vllm.LLM`.
    """
    from vllm_wsi.serving.engine import OfflineEngine  # the one room that needs vLLM

    settings, root = evaluation.settings, str(evaluation.files.common_root)
    engine = OfflineEngine(checkpoint, **{"allowed_local_media_path": root, "seed": settings.seed, **engine_args})
    for arm in evaluation.arms:
        questions = evaluation.asked(arm.mode)
        with (
            evaluation.open(arm, checkpoint, "offline", {"vllm": engine.version}) as results,
            Progress(arm, questions, results) as record,
        ):
            todo = [one for one in questions if not results.done(one.key)]
            for start in range(0, len(todo), CHUNK):
                ready = []
                for question in todo[start : start + CHUNK]:
                    try:
                        ready.append((question, *evaluation.prepare(question, arm)))
                    except (SlideError, OSError) as error:
                        record(missing_row(question, str(error)))
                bodies = [
                    request_body(question, url, arm.mode, checkpoint, settings.max_tokens, needs_structure(question))
                    for question, _, url in ready
                ]
                for (question, slide, _), response in zip(ready, engine.complete(bodies), strict=True):
                    try:
                        answer = read_answer(question, arm.mode, response, needs_structure(question))
                    except ValueError as error:
                        record(error_row(question, slide, str(error), None))
                    else:
                        record(answer_row(question, slide, answer, None))
