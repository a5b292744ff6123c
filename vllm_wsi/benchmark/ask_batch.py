"""OpenAI batch files, so that a cluster's own engine can answer: `vllm run-batch`, Ray Data, a provider's batch API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_wsi.errors import SettingsError, SlideError

from .ask_endpoint import needs_structure, read_answer, request_body
from .runner import Arm, Evaluation, answer_row, error_row, missing_row
from .tasks import Question


def export_batch(evaluation: Evaluation, path: Path, model: str) -> tuple[int, list[str]]:
    """Writes a request for each question of each run; returns their number and the slides without usable features.

    A batch knows no second request: a `choice` question asks for log-probabilities alone, and counts as unparsed where
    no option is among the 20 likeliest tokens; labels of two characters are asked for by structured outputs.
    """
    requests, missing = 0, set()
    with open(path, "w", encoding="utf-8") as file:
        for arm in evaluation.arms:
            for question in evaluation.asked(arm.mode):
                try:
                    _, url = evaluation.prepare(question, arm)
                except (SlideError, OSError):
                    missing.add(question.slide)
                    continue
                body = request_body(
                    question, url, arm.mode, model, evaluation.settings.max_tokens, needs_structure(question)
                )
                custom_id = f"{arm.mode}/{arm.arm}/{question.key}"
                line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                requests += 1
    return requests, sorted(missing)


def import_batch(evaluation: Evaluation, path: Path, model: str) -> None:
    """Scores a batch's output into the results files; a question without a line, or with an error, is an error row.

    Raises:
        SettingsError: a line that is no answer to one of our questions.
    """
    answers: dict[str, dict[str, Any]] = {}
    known = {f"{arm.mode}/{arm.arm}/{one.key}" for arm in evaluation.arms for one in evaluation.asked(arm.mode)}
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
    for arm in evaluation.arms:
        with evaluation.open(arm, model, f"batch {path.name}", {}) as results:
            for question in evaluation.asked(arm.mode):
                if not results.done(question.key):
                    results.append(_row(evaluation, arm, question, answers.get(f"{arm.mode}/{arm.arm}/{question.key}")))


def _row(evaluation: Evaluation, arm: Arm, question: Question, value: dict[str, Any] | None):
    try:
        slide = evaluation.files.find(question.slide)
    except (SlideError, OSError) as error:
        return missing_row(question, str(error))
    if value is None:
        return error_row(question, slide, "found no line in the batch's output", None)
    response = value.get("response") or {}
    if value.get("error") or response.get("status_code", 200) != 200:
        return error_row(question, slide, json.dumps(value.get("error") or response.get("body")), None)
    try:
        answer = read_answer(question, arm.mode, response["body"], needs_structure(question))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return error_row(question, slide, f"{type(error).__name__}: {error}", None)
    return answer_row(question, slide, answer, None)
