"""The same questions without a server: vLLM in this process. The one module here that needs vLLM, when it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_wsi.slides import SlideError

from .client import TOP_LOGPROBS, Mode, needs_structure, read_answer
from .run_eval import Evaluation, answer_row, error_row, missing_row, progress
from .tasks import Question, to_messages

CHUNK = 64
"""Questions handed to the engine at once; a killed run loses no more."""


def ask_offline(evaluation: Evaluation, checkpoint: str, engine_args: Mapping[str, Any]) -> None:
    """Asks every arm's open questions of `vllm.LLM(checkpoint)`; results are on disk after each chunk.

    Args:
        engine_args: further arguments of `vllm.LLM`.
    """
    import vllm

    root = str(evaluation.files.common_root)
    llm = vllm.LLM(checkpoint, **{"allowed_local_media_path": root, "seed": evaluation.settings.seed, **engine_args})
    for arm in evaluation.arms:
        questions = evaluation.asked(arm.mode)
        with (
            evaluation.open(arm, checkpoint, "offline", {"vllm": vllm.__version__}) as results,
            progress(arm, questions, results) as record,
        ):
            todo = [one for one in questions if not results.done(one.key)]
            for start in range(0, len(todo), CHUNK):
                ready = []
                for question in todo[start : start + CHUNK]:
                    try:
                        ready.append((question, *evaluation.prepare(question, arm)))
                    except (SlideError, OSError) as error:
                        record(missing_row(question, str(error)))
                asked = [(question, url) for question, _, url in ready]
                responses = _chat(llm, asked, arm.mode, evaluation.settings.max_tokens)
                for (question, slide, _), response in zip(ready, responses, strict=True):
                    try:
                        answer = read_answer(question, arm.mode, response, needs_structure(question))
                    except ValueError as error:
                        record(error_row(question, slide, str(error), None))
                    else:
                        record(answer_row(question, slide, answer, None))


def _chat(llm: Any, asked: Sequence[tuple[Question, str | None]], mode: Mode, max_tokens: int) -> list[dict[str, Any]]:
    """Answers in the shape of the API's JSON."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    if not asked:
        return []
    params = []
    for question, _ in asked:
        if mode == "generate":
            params.append(SamplingParams(temperature=0, max_tokens=max_tokens))
        elif needs_structure(question):
            choice = StructuredOutputsParams(choice=list(question.options))
            params.append(SamplingParams(temperature=0, max_tokens=8, structured_outputs=choice))
        else:
            params.append(SamplingParams(temperature=0, max_tokens=1, logprobs=TOP_LOGPROBS))
    outputs = llm.chat([to_messages(*one) for one in asked], params, use_tqdm=False)
    return [_response(output.outputs[0]) for output in outputs]


def _response(completion: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"content": completion.text}, "finish_reason": completion.finish_reason}
    if completion.logprobs:
        top = [{"token": one.decoded_token or "", "logprob": one.logprob} for one in completion.logprobs[0].values()]
        choice["logprobs"] = {"content": [{"top_logprobs": top}]}
    return {"choices": [choice]}
