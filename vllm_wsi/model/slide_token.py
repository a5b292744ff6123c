"""From a text decoder to one whose prompts hold slides: a token more, and a chat template that places it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .chat_renderer import takes_parts
from .config import SLIDE_TOKEN

VOCABULARY_MULTIPLE = 64

# Goes before a template that takes text alone. It joins the parts of each message, with the slide token where the
# client put the slide, and writes nothing itself. vLLM sees the loop over `message.content`, and so passes parts.
JOIN_PARTS = """\
{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string or message.content is not iterable -%}
{%- set joined.messages = joined.messages + [message] -%}
{%- else -%}
{%- set text = namespace(value='') -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set text.value = text.value + '<|slide|>' -%}
{%- elif part.type == 'text' -%}{%- set text.value = text.value + part.text -%}
{%- endif -%}
{%- endfor -%}
{%- set joined.messages = joined.messages + [dict(message, content=text.value)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""


def add_slide_token(decoder: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Makes the slide token a special token of both, in place; returns its id. What has one already stays as it is.

    New rows of the embedding (its number of rows becomes a multiple of 64) are the mean of the old ones, so that the
    same decoder gives the same weights, and no new token is ever likelier than the likeliest old one. The decoder never
    sees the slide token's own row: patches stand in its place.

    Args:
        decoder: a causal language model of transformers; tied embeddings stay tied.
        tokenizer: with a chat template; one that takes text alone learns to take parts.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [SLIDE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.chat_template and not takes_parts(tokenizer):
        tokenizer.chat_template = JOIN_PARTS + tokenizer.chat_template
    before = decoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > before:
        decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
        with torch.no_grad():
            for layer in (decoder.get_input_embeddings(), decoder.get_output_embeddings()):
                for rows in (layer.weight, getattr(layer, "bias", None)):
                    if rows is not None:
                        rows[before:] = rows[:before].float().mean(dim=0).to(rows.dtype)
    return tokenizer.convert_tokens_to_ids(SLIDE_TOKEN)
