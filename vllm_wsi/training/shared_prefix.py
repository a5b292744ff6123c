"""Attention for several conversations that share their beginning: the shared prefix once, then a branch for each.

A sequence of T tokens is `[prefix, padding | padding, branch 1, branch 2, ...]`. A token of the prefix sees what
precedes it. A token of a branch sees the whole prefix and what precedes it in its own branch, and nothing of the other
branches. Positions are those of each conversation alone, and so are the hidden states.

Only the branches need a mask. The prefix, where a slide's thousands of patches are, is plain causal attention, which
needs none: its padding stands behind its tokens, where none of them looks. (A patch that is left out would be a gap
before tokens that must not see it: then all of the sequence gets a mask.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_wsi.errors import SettingsError

SHARED_PREFIX = "shared_prefix"
"""The `attn_implementation` of transformers by which a decoder attends so."""


def branch_mask(attention_mask: Tensor, branches: Tensor) -> Tensor:
    """What the tokens of the branches see, and those of the prefix where it has gaps.

    It takes Tb * T bytes for each sequence: 3.4 MB for a prefix of 10,240 tokens and eight branches of 40. PyTorch
    makes a float copy of it in each layer. With a gap it takes T * T bytes: 112 MB.

    Args:
        attention_mask: [B, T], 0 at padding. A gap is a 0 within a prefix, with a token behind it: a patch left out.
        branches: int64 [B, Tb]: which branch each of the last Tb tokens belongs to, from 1; 0 at padding.

    Returns:
        bool [B, 1, Tb, T], True where the query (a row) sees the key; [B, 1, T, T] where a prefix has a gap.
    """
    size = branches.shape[1]
    own = (branches[:, :, None] == branches[:, None, :]).tril_()
    prefix = attention_mask[:, : attention_mask.shape[1] - size].bool()
    mask = torch.cat([prefix[:, None].expand(-1, size, -1), own], dim=-1)
    if (prefix[:, 1:] & ~prefix[:, :-1]).any():
        before = prefix[:, None].expand(-1, prefix.shape[1], -1).tril()
        before.diagonal(dim1=1, dim2=2).fill_(True)  # a row without a key would be NaN
        mask = torch.cat([F.pad(before, (0, size)), mask], dim=1)
    return mask[:, None]


def attend_to_shared_prefix(decoder: Any) -> None:
    """Lets a decoder take a `branch_mask` as its attention mask; without one it computes what it computed before.

    Raises:
        SettingsError: a decoder where one mask does not say all that a token sees (sliding windows, recurrent layers),
            or whose attention is not PyTorch's scaled dot product.
    """
    config, name = decoder.config, type(decoder).__name__
    found = config._attn_implementation
    if found == SHARED_PREFIX:
        return
    wanted = "questions_per_sequence: found {}, wanted 1, or a decoder of ordinary causal attention"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if getattr(config, "sliding_window", None) is not None or getattr(config, "attention_chunk_size", None) is not None:
        kinds.add("sliding_attention")
    if decoder._is_stateful:
        kinds.add("recurrent layers")
    if kinds:
        raise SettingsError(wanted.format(f"{name} with {', '.join(sorted(kinds))}"))
    if found != "sdpa" or not decoder._supports_attention_backend:
        raise SettingsError(wanted.format(f"{name} with the attention {found!r}"))
    decoder.set_attn_implementation(SHARED_PREFIX)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention of this name: query, key and value [B, heads, T, head]; output [B, T, heads, head]."""
    prefix = 0 if attention_mask is None else query.shape[2] - attention_mask.shape[2]
    if prefix == 0:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = options | {"is_causal": True}
    parts = (
        sdpa_attention_forward(module, query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], None, **causal),
        sdpa_attention_forward(module, query[:, :, prefix:], key, value, attention_mask, **options),
    )
    return torch.cat([output for output, _ in parts], dim=1), None


AttentionInterface.register(SHARED_PREFIX, _attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)
