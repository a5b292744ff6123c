"""vLLM in this process, asked and answering in the JSON of POST /v1/chat/completions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import vllm
from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput
from vllm.sampling_params import StructuredOutputsParams

from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.selection.calibration import Trust

from .connector import slide_connector
from .question_hook import with_question
from .vllm_hooks import current_service

logger = logging.getLogger(__name__)


class OfflineEngine:
    """`vllm.LLM` behind the request and response bodies of the API, as far as the evaluation uses them.

    Args:
        checkpoint: directory or hub name.
        engine_args: further arguments of `vllm.LLM`.
    """

    version: str = vllm.__version__

    def __init__(self, checkpoint: str, **engine_args: Any) -> None:
        self._llm = LLM(checkpoint, **engine_args)
        model = self._llm.model_config
        self._connector = slide_connector(model) if isinstance(model.hf_config, SparseWSIConfig) else None

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The responses to chat completion requests, in their order; all run in one batch.

        Beside what the API answers, a response of a slide model holds in "slide_trust" what POST /v1/wsi/select answers
        of the request's slide: the fields of `Trust`.
        """
        if not bodies:
            return []
        params = [_sampling(body) for body in bodies]
        outputs = self._llm.chat([body["messages"] for body in bodies], params, use_tqdm=False)
        return [
            _response(output.outputs[0]) | self._trust(body["messages"])
            for output, body in zip(outputs, bodies, strict=True)
        ]

    def _trust(self, messages: Sequence[Any]) -> dict[str, Any]:
        """Of the only slide of some messages, whose selection the service remembers from their answer."""
        service = current_service()
        if self._connector is None or service is None:
            return {}
        calibration = service.calibration
        trust = Trust() if calibration is None else Trust(answer_temperature=round(calibration.temperature, 4))
        slides = _slide_urls(messages if service.questions is None else with_question(messages))
        if calibration is not None and len(slides) == 1:
            try:
                trust = Trust.of(calibration, self._connector.fetch_image(slides[0]).selection)
            except Exception as error:  # whatever it is, the answer is there and must not be lost
                logger.warning("%s: found no selection after its answer: %s", slides[0], error)
        return {"slide_trust": trust._asdict() | {"warnings": list(trust.warnings)}}


def _slide_urls(messages: Sequence[Any]) -> list[str]:
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part["image_url"]["url"] for parts in contents for part in parts if part["type"] == "image_url"]


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
