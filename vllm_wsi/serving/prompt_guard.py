"""Refuses prompts that vLLM's own checks let through.

A slide token that a user types is a real token: without a check it would take a slide's place, or reach the decoder as
an untrained embedding. And vLLM takes the `image_embeds` and `image_pil` parts of a prompt whatever JSON they hold, and
fails on most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from vllm.exceptions import VLLMValidationError

from vllm_wsi.model.config import SLIDE_TOKEN, SparseWSIConfig


def check_slide_tokens(prompt: Sequence[int], config: SparseWSIConfig, num_slides: int) -> None:
    found = list(prompt).count(config.slide_token_id)
    if found != num_slides:
        raise VLLMValidationError(
            f"the prompt holds {found} slide tokens ({SLIDE_TOKEN}), wanted {num_slides}, one for each slide; "
            "the token may not be typed into the text"
        )


def refusing_typed_slide_tokens(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps `InputProcessor._validate_model_input`."""

    def validate(self: Any, prompt_input: Any, *args: Any, **kwargs: Any) -> None:
        config = self.model_config.hf_config
        if isinstance(config, SparseWSIConfig) and prompt_input["type"] == "token":
            check_slide_tokens(prompt_input["prompt_token_ids"], config, 0)
        original(self, prompt_input, *args, **kwargs)

    return validate


def refusing_embeds_without_data(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `chat_utils._get_embeds_data`, the one place where vLLM merges the `image_embeds` parts of a prompt."""

    def get_embeds_data(modality: str, data_items: list[Any], mm_processor: Any) -> Any:
        if isinstance(mm_processor.info.get_hf_config(), SparseWSIConfig):
            for item in data_items:
                if not isinstance(item, Tensor):
                    found = "nothing" if item is None else f"a {type(item).__name__}"
                    raise VLLMValidationError(
                        f"{modality}_embeds: found {found}, wanted the features of one slide as base64 text"
                    )
        return original(modality, data_items, mm_processor)

    return get_embeds_data


def refusing_json_pictures(original: Callable[..., None]) -> Callable[..., None]:
    """Wraps `AsyncMultiModalContentParser.parse_image_pil`, through which all parts of HTTP requests go."""

    def parse_image_pil(self: Any, image_pil: Any, *args: Any, **kwargs: Any) -> None:
        is_json = isinstance(image_pil, (str, bool, int, float, list, dict))
        if is_json and isinstance(self._tracker.model_config.hf_config, SparseWSIConfig):
            found = type(image_pil).__name__
            raise VLLMValidationError(f"image_pil: found a {found}, wanted image_url with a slide's URL")
        original(self, image_pil, *args, **kwargs)

    return parse_image_pil
