"""The multimodal processor: from selected slides to placeholders and rows for the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from weakref import WeakSet

import torch
import vllm.envs as envs
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    TimingContext,
)

from vllm_wsi.errors import SettingsError
from vllm_wsi.model.checkpoint import load_calibration, load_scorer
from vllm_wsi.model.config import SLIDE_TOKEN, SparseWSIConfig
from vllm_wsi.model.question_reader import QuestionReader
from vllm_wsi.selection.calibration import Calibration
from vllm_wsi.selection.question_scorer import QuestionScorer
from vllm_wsi.selection.scorer import FrozenScorer, scorer_digest
from vllm_wsi.selection.selection import Selection
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.store.store_settings import store_settings
from vllm_wsi.store.stored_selector import scorer_name

from . import vllm_hooks
from .prompt_guard import check_slide_tokens
from .server_options import ServerOptions
from .slide_parser import MODALITY, SlideParser
from .slide_request import SelectedSlide

MAX_SLIDE_TOKENS = 256
"""Largest K that one request may ask for, unless the server's own K is larger."""

# Checked once: encoding the slide token takes 0.25 ms, and each chat request would pay it.
_checked_tokenizers: WeakSet = WeakSet()


class SparseWSIProcessingInfo(BaseProcessingInfo):
    """Hands the checkpoint's scorer to the selection service; made at the start, and again for each chat request."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(ctx)
        try:
            self._set_up()
        except ValueError as error:
            # vLLM takes a ValueError here for «has no processor» and would serve text alone.
            raise RuntimeError(str(error)) from error

    def _set_up(self) -> None:
        if getattr(envs, "VLLM_USE_RUST_FRONTEND", False):
            raise SettingsError("VLLM_USE_RUST_FRONTEND=1 bypasses the plugins; unset it to serve slides")
        use_slide_connector()
        vllm_hooks.install("API server")
        config, model = self.get_hf_config(), self.ctx.model_config
        self._check_tokenizer(config)
        given = self.ctx.get_mm_config().mm_processor_kwargs or {}
        if unknown := given.keys() - ServerOptions.model_fields.keys():
            found, known = ", ".join(sorted(unknown)), ", ".join(ServerOptions.model_fields)
            raise SettingsError(f"--mm-processor-kwargs: found {found}, wanted some of {known}")
        options = ServerOptions.of(given, "--mm-processor-kwargs")
        k = options.num_slide_tokens or config.num_slide_tokens
        device = options.selection_device or options.device or "auto"
        room = model.max_model_len - 1
        least = config.summary_tokens + 1
        if not least <= k <= room:
            raise SettingsError(f"num_slide_tokens: found {k}, wanted {least} .. {room} (--max-model-len less 1)")
        self.max_slide_tokens = max(k, min(MAX_SLIDE_TOKENS, room))
        scorer, digest, calibration = _scorer(model.model, model.revision)
        encoder = config.encoder_check(options.encoder_mismatch)
        selector = SlideSelector(
            scorer,
            k,
            device,
            config.max_patches,
            encoder=encoder,
            max_slide_tokens=self.max_slide_tokens,
            summary_tokens=config.summary_tokens,
        )
        # The rule for encoders is part of the key: a selection under another rule is not used.
        store = store_settings(options.selection_store, options.selection_store_gib)
        name = scorer_name(digest, selector)
        questions = None
        if isinstance(scorer, QuestionScorer):
            questions = partial(QuestionReader, scorer, model.model, model.revision)
        self.service = vllm_hooks.service_for(selector, name, self.max_slide_tokens, store, questions, calibration)

    def _check_tokenizer(self, config: SparseWSIConfig) -> None:
        tokenizer = self.ctx.tokenizer
        if tokenizer is None or tokenizer in _checked_tokenizers:
            return
        ids = tokenizer.encode(SLIDE_TOKEN, add_special_tokens=False)
        if ids != [config.slide_token_id]:
            raise SettingsError(
                f"tokenizer: found {SLIDE_TOKEN} as {ids}, wanted [{config.slide_token_id}] (slide_token_id)"
            )
        _checked_tokenizers.add(tokenizer)

    def get_hf_config(self) -> SparseWSIConfig:
        return self.ctx.get_hf_config(SparseWSIConfig)

    def get_data_parser(self) -> SlideParser:
        return SlideParser(self.service)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {MODALITY: None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {MODALITY: self.max_slide_tokens}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}


class SparseWSIDummyInputsBuilder(BaseDummyInputsBuilder[SparseWSIProcessingInfo]):
    """Slides for the memory profile: already selected, so that no dummy matrix is ever made."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return SLIDE_TOKEN * mm_counts.get(MODALITY, 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        info = self.info
        k, d = info.max_slide_tokens, info.get_hf_config().feature_dim
        selection = Selection(torch.arange(k), torch.zeros(k), torch.zeros(k, d), num_patches=k, num_nonfinite=0)
        slides = [
            SelectedSlide(selection, f"dummy-{i}", info.service.scorer, info.service.default_k, None)
            for i in range(mm_counts.get(MODALITY, 0))
        ]
        return {MODALITY: slides}  # type: ignore[dict-item]


class SparseWSIMultiModalProcessor(BaseMultiModalProcessor[SparseWSIProcessingInfo]):
    """Lays out the kept patches of each slide as its placeholders; nothing here reads or scores."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        if options := inputs.hf_processor_mm_kwargs:
            raise SettingsError(
                f"mm_processor_kwargs: found {', '.join(options)} in a request, wanted them at the server's start; "
                "one request chooses its K by the slide's URL (slide.h5#k=64)"
            )
        check_slide_tokens(
            inputs.prompt, self.info.get_hf_config(), inputs.mm_data_items.get_count(MODALITY, strict=False)
        )
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        slides: list[SelectedSlide] = hf_data["images"]  # type: ignore[assignment]
        return BatchFeature(
            {
                # Of one dtype: vLLM stacks the slides of several requests in the dtype of the first.
                "rows": [slide.selection.rows.float() for slide in slides],
                "scores": [slide.selection.scores for slide in slides],
                "kept": [slide.selection.indices for slide in slides],
                "num_candidates": torch.tensor([slide.selection.num_candidates for slide in slides]),
                "num_patches": torch.tensor([slide.selection.num_patches for slide in slides]),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "rows": MultiModalFieldConfig.batched(MODALITY),
            "scores": MultiModalFieldConfig.batched(MODALITY),
            "kept": MultiModalFieldConfig.batched(MODALITY, keep_on_cpu=True),
            "num_candidates": MultiModalFieldConfig.batched(MODALITY, keep_on_cpu=True),
            "num_patches": MultiModalFieldConfig.batched(MODALITY, keep_on_cpu=True),
            "image_embeds": MultiModalFieldConfig.batched(MODALITY),  # feature matrices that a client sends by value
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        slide_token = self.info.get_hf_config().slide_token_id

        def slide_tokens(item_idx: int) -> list[int]:
            rows = out_mm_kwargs[MODALITY][item_idx]["rows"].data
            return [slide_token] * rows.shape[0]

        return [PromptReplacement(modality=MODALITY, target=[slide_token], replacement=slide_tokens)]

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> dict[str, list[str]]:
        """The hash of a slide's own identity and of the client's uuid, where there is one. A uuid never replaces the
        identity."""
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        hashes = {}
        for modality, items in inputs.mm_data_items.items():
            uuids = (inputs.mm_uuid_items or {}).get(modality) or [None] * len(items)
            hashes[modality] = [
                MultiModalHasher.hash_kwargs(algorithm, model_id=self.info.model_id, slide=digest, uuid=uuid)
                for digest, uuid in zip(items.get_all_items_for_hash(), uuids, strict=True)
            ]
        return hashes


def use_slide_connector() -> None:
    """Makes vLLM fetch media through `SlideConnector`, in this process and its children."""
    from .connector import CONNECTOR

    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", CONNECTOR)
    if envs.VLLM_MEDIA_CONNECTOR != CONNECTOR:
        raise SettingsError(
            f"VLLM_MEDIA_CONNECTOR: found {envs.VLLM_MEDIA_CONNECTOR!r}, wanted {CONNECTOR!r} to serve slides; "
            "set it before vLLM starts"
        )


@lru_cache(maxsize=4)
def _scorer(model: str, revision: str | None) -> tuple[FrozenScorer, str, Calibration | None]:
    """A checkpoint's scorer, its digest and what was fitted to it, read once: vLLM makes a processor for every chat
    request."""
    scorer = load_scorer(model, revision)
    return scorer, scorer_digest(scorer), load_calibration(model, scorer, revision)
