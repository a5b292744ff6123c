"""The model that a training run starts from, its adapters, and what its checkpoint says of the end of an answer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from vllm_wsi.errors import needs_extra
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.checkpoint import loading, read_config, trained_scorer
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.slide_token import add_slide_token
from vllm_wsi.parts.smollm2 import resolve_decoder

from .settings import SCORERS_OWN, LoraSettings, ModelSettings


def start_model(
    settings: ModelSettings, seed: int
) -> tuple[SparseWSIForConditionalGeneration, PreTrainedTokenizerBase]:
    """The model that training starts from, its decoder in the dtype of the settings, and its tokenizer."""
    if settings.new is not None:
        model, tokenizer = new_model(settings.new if settings.new.seed is not None else settings.new.changed(seed=seed))
        model.language_model.to(getattr(torch, settings.dtype or "float32"))
        return model, tokenizer
    options = {"revision": settings.revision, "dtype": settings.dtype or "auto"}
    if settings.checkpoint is not None:
        with loading(settings.checkpoint):
            model = SparseWSIForConditionalGeneration.from_pretrained(settings.checkpoint, **options)
            return model, AutoTokenizer.from_pretrained(settings.checkpoint, revision=settings.revision)
    return _around_decoder(settings, options)


def _around_decoder(
    settings: ModelSettings, options: dict[str, Any]
) -> tuple[SparseWSIForConditionalGeneration, PreTrainedTokenizerBase]:
    """A text decoder behind a new scorer and projector; `options` of `from_pretrained`."""
    assert settings.decoder is not None
    name = resolve_decoder(settings.decoder)
    slide_part = {field: getattr(settings, field) for field in SCORERS_OWN}
    if settings.scorer_from is not None:
        trained = read_config(settings.scorer_from)
        slide_part = {field: getattr(trained, field) for field in SCORERS_OWN}
    with loading(settings.decoder):
        decoder = AutoModelForCausalLM.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=settings.revision)
    slide_token_id = add_slide_token(decoder, tokenizer)
    config = SparseWSIConfig(
        text_config=decoder.config,
        num_slide_tokens=settings.num_slide_tokens,
        summary_tokens=settings.summary_tokens,
        projector=settings.projector,
        position_ids=settings.position_ids,
        max_slide_positions=settings.max_slide_positions,
        slide_token_id=slide_token_id,
        **slide_part,
    )
    model = SparseWSIForConditionalGeneration(config, language_model=decoder)
    if settings.scorer_from is not None:
        model.scorer.load_state_dict(trained_scorer(settings.scorer_from).state_dict())
    model.generation_config = decoder.generation_config
    return model, tokenizer


def with_lora(decoder: Any, settings: LoraSettings) -> Any:
    """The decoder with new adapters, which alone would learn in it."""
    with needs_extra("train"):
        from peft import LoraConfig, get_peft_model

    return get_peft_model(
        decoder,
        LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def name_end_of_turn(model: SparseWSIForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Where `generate` ends is where vLLM ends: at what the checkpoint names, and at the tokenizer's own token."""
    config = model.generation_config
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = sorted({*named, *ChatRenderer(tokenizer).end_of_turn()} - {None})
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
