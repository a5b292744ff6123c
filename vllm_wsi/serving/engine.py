"""vLLM in this process, asked and answering in the JSON of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import vllm
from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput
from vllm.sampling_params import StructuredOutputsParams


class OfflineEngine:
    """`vllm.LLM` behind the request and response bodies of the API, as far as the evaluation uses them.

    Args:
        checkpoint: directory or hub name.
        engine_args: further arguments of `vllm.LLM`.
    """

    version: str = vllm.__version__

    def __init__(self, checkpoint: str, **engine_args: Any) -> None:
        self._llm = LLM(checkpoint, **engine_args)

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The responses to chat completion requests, in their order; all run in one batch."""
        if not bodies:
            return []
        params = [_sampling(body) for body in bodies]
        outputs = self._llm.chat([body["messages"] for body in bodies], params, use_tqdm=False)
        return [_response(output.outputs[0]) for output in outputs]


def _sampling(body: Mapping[str, Any]) -> SamplingParams:
    structured = body.get("structured_outputs")
    return SamplingParams(
        temperature=body["temperature"],
        max_tokens=body["max_tokens"],
        logprobs=body["top_logprobs"] if body.get("logprobs") else None,
        structured_outputs=None if structured is None else StructuredOutputsParams(**structured),
    )


def _response(completion: CompletionOutput) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"content": completion.text}, "finish_reason": completion.finish_reason}
    if completion.logprobs:
        top = [{"token": one.decoded_token or "", "logprob": one.logprob} for one in completion.logprobs[0].values()]
        choice["logprobs"] = {"content": [{"top_logprobs": top}]}
    return {"choices": [choice]}
