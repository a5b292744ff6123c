"""OpenAI batch files, so that another engine can answer: `vllm run-batch`, Ray Data, a provider's batch API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_wsi.errors import SettingsError

from .prepared import PreparedQuestion
from .results import Row
from .runner import Arm, Evaluation
from .tasks import Question


def export_batch(evaluation: Evaluation, path: Path, model: str) -> tuple[int, list[str]]:
    """Writes one request for each question of each arm.

    A batch allows no second request. So a question in mode "choice" that no label is found for among the 20 likeliest
    tokens counts as unparsed; labels of two characters are asked for by structured outputs.

    Args:
        path: of the JSONL file.
        model: the name under which the batch's engine serves the checkpoint.

    Returns:
        (number of requests, slides without usable features).
    """
    num_requests, missing = 0, set()
    with open(path, "w", encoding="utf-8") as file:
        for arm in evaluation.arms:
            for question in evaluation.questions_in(arm.mode):
                ready = evaluation.prepare(question, arm)
                if isinstance(ready, Row):
                    missing.add(question.slide)
                    continue
                body = ready.request(model, evaluation.settings.max_tokens)
                line = {
                    "custom_id": _custom_id(arm, question),
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": body,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                num_requests += 1
    return num_requests, sorted(missing)


def import_batch(evaluation: Evaluation, path: Path, model: str) -> None:
    """Writes the rows of a batch's output; a question without a line, or whose line is an error, is an error row.

    Args:
        path: of the JSONL file that the batch's engine wrote.
        model: as it was exported.

    Raises:
        SettingsError: a line is no answer to one of this run's questions.
    """
    answers = _read_answers(evaluation, path)
    for arm in evaluation.arms:
        with evaluation.recorder(arm, model, f"batch {path.name}", {}) as recorder:
            for question in recorder.todo:
                found = evaluation.prepare(question, arm, is_to_be_asked=False)
                if isinstance(found, PreparedQuestion):
                    found = _row(found, answers.get(_custom_id(arm, question)))
                recorder.record(found)


def _read_answers(evaluation: Evaluation, path: Path) -> dict[str, dict[str, Any]]:
    """custom_id -> the line of a batch's output."""
    answers: dict[str, dict[str, Any]] = {}
    known = {_custom_id(arm, one) for arm in evaluation.arms for one in evaluation.questions_in(arm.mode)}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
                custom_id = value["custom_id"]
            except (ValueError, KeyError, TypeError):
                raise SettingsError(
                    f"{path}, line {number}: found no batch answer, wanted custom_id and response"
                ) from None
            if custom_id not in known:
                raise SettingsError(f"{path}, line {number}: custom_id: found {custom_id!r}, wanted one of this run's")
            answers[custom_id] = value
    return answers


def _custom_id(arm: Arm, question: Question) -> str:
    return f"{arm.mode}/{arm.arm}/{question.key}"


def _row(prepared: PreparedQuestion, line: dict[str, Any] | None) -> Row:
    if line is None:
        return prepared.failed("found no line in the batch's output")
    response = line.get("response") or {}
    if line.get("error") or response.get("status_code", 200) != 200:
        return prepared.failed(json.dumps(line.get("error") or response.get("body")))
    return prepared.responded(response.get("body") or {})
