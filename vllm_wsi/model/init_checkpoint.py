"""Checkpoints from a seed: random weights, real contract. For demos, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedTokenizerFast

from vllm_wsi.selection.scorer import build_scorer

from .checkpoint import SCORER_PREFIX, SINGLE
from .config import SLIDE_TOKEN, SparseWSIConfig
from .modeling import SparseWSIForConditionalGeneration

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


def new_model(
    feature_dim: int,
    *,
    decoder: str = "qwen2",
    hidden_size: int = 128,
    num_layers: int = 2,
    max_position_embeddings: int = 8192,
    rope_theta: float = 10000.0,
    scorer_kind: str = "patch",
    scorer_hidden_size: int = 256,
    num_slide_tokens: int = 32,
    position_ids: str = "original",
    max_slide_positions: int | None = None,
    encoder: str | None = None,
    texts: Iterable[str] = (),
    initializer_range: float = 0.15,
    seed: int = 0,
) -> tuple[SparseWSIForConditionalGeneration, PreTrainedTokenizerFast]:
    """A small model with random weights that follow from the seed, and its tokenizer.

    Args:
        feature_dim: d of the features that it takes.
        decoder: one of `DECODERS`.
        hidden_size: of the decoder, a multiple of 32 (heads of 32).
        rope_theta: long slides at their original positions want a large one (Qwen2.5 has 1e6).
        scorer_kind: "patch" or "context" (`selection/scorer.py`).
        encoder: id@revision of the features.
        texts: see `byte_tokenizer`.
        initializer_range: transformers' own 0.02 makes a model this small repeat one token.

    Raises:
        ValueError: an unknown decoder.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder: found {decoder!r}, wanted one of {', '.join(DECODERS)}")
    if hidden_size % 32:
        raise ValueError(f"hidden_size: found {hidden_size}, wanted a multiple of 32")
    tokenizer = byte_tokenizer(texts)
    eos = tokenizer.convert_tokens_to_ids(TURN_END)
    text_config = CONFIG_MAPPING[decoder](
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64 if hidden_size % 64 == 0 else hidden_size // 32,
        head_dim=32,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        initializer_range=initializer_range,
        tie_word_embeddings=False,
        architectures=[DECODERS[decoder]],
        bos_token_id=None,
        eos_token_id=eos,
    )
    config = SparseWSIConfig(
        text_config=text_config,
        feature_dim=feature_dim,
        encoder=encoder,
        num_slide_tokens=num_slide_tokens,
        scorer={"kind": scorer_kind, "hidden_size": scorer_hidden_size},
        position_ids=position_ids,
        max_slide_positions=max_slide_positions,
        slide_token_id=tokenizer.convert_tokens_to_ids(SLIDE_TOKEN),
        initializer_range=initializer_range,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SparseWSIForConditionalGeneration(config)
    model.language_model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    model.generation_config = model.language_model.generation_config
    return model, tokenizer


def init_checkpoint(out: str | Path, feature_dim: int, **options: Any) -> None:
    """Writes a checkpoint directory with random weights that follow from the seed.

    Args:
        out: a directory that does not exist yet, or is empty.
        feature_dim: d of the features that it takes.
        options: of `new_model`.

    Raises:
        ValueError: an unknown decoder, or a directory with content.
    """
    out = _new_directory(out)
    model, tokenizer = new_model(feature_dim, **options)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def init_shape(
    out: str | Path,
    feature_dim: int,
    text_config: dict[str, Any],
    *,
    scorer_kind: str = "patch",
    scorer_hidden_size: int = 256,
    num_slide_tokens: int = 32,
    position_ids: str = "original",
    seed: int = 0,
) -> None:
    """Writes a checkpoint directory whose decoder has a shape and no weights: for `vllm serve --load-format dummy`.

    What a decoder of real size costs can so be measured without its download. Only the scorer has (random) weights:
    it works in the API server, which reads it from safetensors whatever `--load-format` says. The tokenizer knows
    bytes; the decoder's further tokens decode to nothing.

    Args:
        out: a directory that does not exist yet, or is empty.
        feature_dim: d of the features that it takes.
        text_config: the decoder's `config.json`, with `model_type` and `architectures`.

    Raises:
        ValueError: a configuration that names no decoder or fewer tokens than bytes, or a directory with content.
    """
    for key in ("model_type", "architectures", "vocab_size"):
        if not text_config.get(key):
            raise ValueError(f"text_config: {key}: found none, wanted a decoder's config.json")
    tokenizer = byte_tokenizer()
    if text_config["vocab_size"] < len(tokenizer):
        raise ValueError(
            f"text_config: vocab_size: found {text_config['vocab_size']}, wanted at least {len(tokenizer)}"
        )
    eos = tokenizer.convert_tokens_to_ids(TURN_END)
    config = SparseWSIConfig(
        text_config=text_config | {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": eos},
        feature_dim=feature_dim,
        num_slide_tokens=num_slide_tokens,
        scorer={"kind": scorer_kind, "hidden_size": scorer_hidden_size},
        position_ids=position_ids,
        slide_token_id=tokenizer.convert_tokens_to_ids(SLIDE_TOKEN),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = build_scorer(feature_dim=feature_dim, **config.scorer)
    out = _new_directory(out)
    config.save_pretrained(out)
    GenerationConfig(eos_token_id=eos, pad_token_id=eos).save_pretrained(out)
    tokenizer.save_pretrained(out)
    state = {f"{SCORER_PREFIX}{name}": value for name, value in scorer.state_dict().items()}
    save_file(state, out / SINGLE, metadata={"format": "pt"})


def _new_directory(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: found a file or a directory with content, wanted a new directory")
    out.mkdir(parents=True, exist_ok=True)
    return out
