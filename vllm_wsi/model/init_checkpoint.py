"""Checkpoints from a seed: random weights, real contract. For demos, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedTokenizerFast

from vllm_wsi.errors import CheckpointError
from vllm_wsi.files import new_folder, refuse_content
from vllm_wsi.selection.scorer import seeded_scorer

from .checkpoint import SCORER_PREFIX
from .config import SLIDE_TOKEN, SparseWSIConfig
from .modeling import SparseWSIForConditionalGeneration
from .tiny_settings import SlideSettings, TinySettings
from .weight_files import SINGLE

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [TURN_END, TURN_START, SLIDE_TOKEN]

# Content in parts, as vLLM passes it to a template that loops over `message.content`: slides stay where the
# client put them.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|slide|>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""

MAX_LEARNED_VOCABULARY = 1024
DECODERS = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def byte_tokenizer(texts: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer that needs no download: 256 bytes, the marks of a chat turn, and the slide token.

    Args:
        texts: their words become tokens of their own; any other text still goes by its bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = list(texts)
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(words))
    tokenizer.decoder = decoders.ByteLevel()
    if words:
        size = MAX_LEARNED_VOCABULARY
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(words, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=TURN_END,
        additional_special_tokens=[TURN_START, SLIDE_TOKEN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(settings: TinySettings) -> tuple[SparseWSIForConditionalGeneration, PreTrainedTokenizerFast]:
    """A small model with random weights that follow from the seed, and its tokenizer.

    Raises:
        CheckpointError: slides are to take more positions than the decoder has.
    """
    tokenizer = byte_tokenizer(settings.texts)
    eos = tokenizer.convert_tokens_to_ids(TURN_END)
    size = settings.hidden_size
    text_config = CONFIG_MAPPING[settings.decoder](
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=size // 32,
        num_key_value_heads=size // 64 if size % 64 == 0 else size // 32,
        head_dim=32,
        max_position_embeddings=settings.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        initializer_range=settings.initializer_range,
        tie_word_embeddings=False,
        architectures=[DECODERS[settings.decoder]],
        bos_token_id=None,
        eos_token_id=eos,
    )
    config = _config(settings, text_config, tokenizer, initializer_range=settings.initializer_range)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed or 0)
        model = SparseWSIForConditionalGeneration(config)
    model.language_model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    model.generation_config = model.language_model.generation_config
    return model, tokenizer


def init_checkpoint(out: str | Path, settings: TinySettings) -> None:
    """Writes a checkpoint directory with random weights that follow from the seed.

    Args:
        out: a directory that does not exist yet, or is empty.

    Raises:
        SettingsError: a directory with content.
    """
    refuse_content(out := Path(out).absolute())
    model, tokenizer = new_model(settings)
    with new_folder(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def init_shape(out: str | Path, settings: SlideSettings, text_config: dict[str, Any]) -> None:
    """Writes a checkpoint directory whose decoder has a shape and no weights: for `vllm serve --load-format dummy`.

    What a decoder of real size costs can so be measured without its download. Only the scorer has (random) weights:
    it works in the API server, which reads it from safetensors whatever `--load-format` says. The tokenizer knows
    bytes; the decoder's further tokens decode to nothing.

    Args:
        out: a directory that does not exist yet, or is empty.
        text_config: the decoder's `config.json`, with `model_type` and `architectures`.

    Raises:
        CheckpointError: a configuration that names no decoder or fewer tokens than bytes.
        SettingsError: a directory with content.
    """
    for key in ("model_type", "architectures", "vocab_size"):
        if not text_config.get(key):
            raise CheckpointError(f"text_config: {key}: found none, wanted a decoder's config.json")
    tokenizer = byte_tokenizer()
    if text_config["vocab_size"] < len(tokenizer):
        raise CheckpointError(
            f"text_config: vocab_size: found {text_config['vocab_size']}, wanted at least {len(tokenizer)}"
        )
    eos = tokenizer.convert_tokens_to_ids(TURN_END)
    shape = text_config | {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": eos}
    config = _config(settings, shape, tokenizer)
    scorer = seeded_scorer(seed=settings.seed or 0, **config.scorer_options)
    refuse_content(out := Path(out).absolute())
    state = {f"{SCORER_PREFIX}{name}": value for name, value in scorer.state_dict().items()}
    with new_folder(out) as partial:
        config.save_pretrained(partial)
        GenerationConfig(eos_token_id=eos, pad_token_id=eos).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_file(state, partial / SINGLE, metadata={"format": "pt"})


def _config(
    settings: SlideSettings, text_config: Any, tokenizer: PreTrainedTokenizerFast, **more: Any
) -> SparseWSIConfig:
    return SparseWSIConfig(
        text_config=text_config,
        feature_dim=settings.feature_dim,
        encoder=settings.encoder,
        patch_um=settings.patch_um,
        num_slide_tokens=settings.num_slide_tokens,
        summary_tokens=settings.summary_tokens,
        scorer=_scorer(settings),
        projector={"inputs": list(settings.projector_inputs)},
        position_ids=settings.position_ids,
        max_slide_positions=settings.max_slide_positions,
        slide_token_id=tokenizer.convert_tokens_to_ids(SLIDE_TOKEN),
        **more,
    )


def _scorer(settings: SlideSettings) -> dict[str, Any]:
    scorer: dict[str, Any] = {"kind": settings.scorer_kind, "hidden_size": settings.scorer_hidden_size}
    if settings.scorer_kind == "question":
        scorer["rank"] = settings.scorer_rank
        if settings.free_tokens is not None:
            scorer["free_tokens"] = settings.free_tokens
    return scorer
