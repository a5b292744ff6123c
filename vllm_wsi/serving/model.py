"""The model inside vLLM's engine: a projector in front of a decoder that vLLM knows."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsLoRA,
    SupportsMRoPE,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sequence import IntermediateTensors

from vllm_wsi.errors import SettingsError, SlideError
from vllm_wsi.model.config import SLIDE_TOKEN, SparseWSIConfig
from vllm_wsi.model.modeling import SlideProjector
from vllm_wsi.selection.positions import SlideSpan, prompt_positions

from . import vllm_hooks
from .adapters import DECODER_NAMES
from .decoder_kinds import check_decoder
from .processor import SparseWSIDummyInputsBuilder, SparseWSIMultiModalProcessor, SparseWSIProcessingInfo

EXTENSIBLE_ROPE = ("default", "linear", "llama3")
"""Rotary embeddings whose table can be made longer without a change of its values."""


@MULTIMODAL_REGISTRY.register_processor(
    SparseWSIMultiModalProcessor, info=SparseWSIProcessingInfo, dummy_inputs=SparseWSIDummyInputsBuilder
)
class SparseWSIForConditionalGeneration(
    nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA, SupportsMRoPE
):  # fmt: skip
    """Serves the checkpoints of `vllm_wsi.model.modeling.SparseWSIForConditionalGeneration`.

    An exception inside the engine's step would stop every request. So everything that can be wrong with a slide is
    refused in the API server, and nothing here can fail for a single request.
    """

    hf_to_vllm_mapper = DECODER_NAMES

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("image"):
            return SLIDE_TOKEN
        raise SlideError(f"found a part of type {modality}, wanted image_url with a slide's URL")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        vllm_hooks.install("model")
        config: SparseWSIConfig = vllm_config.model_config.hf_config
        self.config = config
        check_decoder(vllm_config, config)
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.slide_token_id])
        with self._mark_tower_model(vllm_config, "image"):
            self.projector = SlideProjector.from_config(config).float()  # as it was trained
        self._dtype = vllm_config.model_config.dtype
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=with_rotary_room(config, vllm_config.model_config.max_model_len),
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """One [num_tokens, hidden] tensor for each slide; `rows` is one stacked tensor where all have one size, else
        a list."""
        rows = kwargs.get("rows")
        if rows is None:
            return []
        device = self.projector.linear_2.weight.device
        sizes = [len(slide) for slide in rows]
        flat, scores = (
            torch.cat([slide.to(device, torch.float32) for slide in slides]) for slides in (rows, kwargs["scores"])
        )
        num_candidates = torch.as_tensor(kwargs["num_candidates"]).repeat_interleave(torch.tensor(sizes))
        return self.projector(flat, scores, num_candidates).to(self._dtype).split(sizes)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Positions of a prompt, the same in all three of M-RoPE's channels; called in "original" mode alone."""
        slides = []
        for feature in mm_features:
            if feature.data is not None:
                place, kept = feature.mm_position, feature.data["kept"].data
                num_patches = int(feature.data["num_patches"].data)
                slides.append(SlideSpan(place.offset, kept, num_patches, place.length - len(kept)))
        positions, delta = prompt_positions(len(input_tokens), slides, self.config.slide_position_budget)
        return positions.expand(3, -1), delta

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """Hidden states of the decoder.

        Args:
            input_ids: int64 [T], or None where `inputs_embeds` is given.
            positions: int64 [T], or [3, T] in "original" mode, all three rows alike.
            intermediate_tensors: of the pipeline's earlier stage.
            inputs_embeds: [T, hidden].

        vLLM compiles the decoder below and captures CUDA graphs of this whole method, so nothing here may wait for the
        GPU, branch on a value, or make a tensor at a new address. `positions[0]` is a view of vLLM's own buffer; how
        many dimensions it has depends on the checkpoint alone. The projector and the positions stay outside: vLLM calls
        `embed_multimodal` and `get_mrope_input_positions` before. tests/serving/test_compiled_forward.py holds that it
        is one graph, without breaks and without a second compilation.
        """
        if intermediate_tensors is not None:
            inputs_embeds = None
        if positions.ndim == 2:  # M-RoPE's channels, all alike: the decoder knows one
            positions = positions[0]
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        # The scorer works in the API server (`service.py`), before the engine.
        return AutoWeightsLoader(self).load_weights(item for item in weights if not item[0].startswith("scorer."))

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="projector", tower_model="projector"
        )


def with_rotary_room(config: SparseWSIConfig, max_model_len: int) -> Any:
    """The decoder's configuration, with a rotary table that reaches the last position of the longest prompt.

    Slides take at most `slide_position_budget` positions and text at most `max_model_len`, so positions stay below
    their sum.

    Raises:
        SettingsError: the table is too short and its kind of RoPE cannot be made longer.
    """
    text_config = copy.deepcopy(config.text_config)
    table = text_config.max_position_embeddings
    needed = config.slide_position_budget + max_model_len
    if needed <= table:
        return text_config
    kind = (getattr(text_config, "rope_parameters", None) or {}).get("rope_type")
    if config.slide_position_budget == 0:
        return text_config
    if kind not in EXTENSIBLE_ROPE:
        raise SettingsError(
            f"position_ids 'original' needs {needed} positions (max_slide_positions {config.max_slide_positions} + "
            f"--max-model-len {max_model_len}), but the decoder's {kind} RoPE has {table}; "
            f"start with --max-model-len {table - config.max_slide_positions} or less"
        )
    text_config.max_position_embeddings = needed
    return text_config
