"""The learned scorers: one number for each patch. The paper describes both (SparseLearn, scorer S)."""

from __future__ import annotations

import copy
import hashlib
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_wsi.errors import CheckpointError
from vllm_wsi.kernels import ScorerWeights
from vllm_wsi.kernels.reference import apply_scorer

from .question_scorer import QuestionScorer, vector_scores


class PatchScorer(nn.Module):
    """s = Linear(h, 1)(GELU(Linear(d, h)(LayerNorm(x)))), each patch by itself.

    The reading that scales to 100,000 patches and fuses into one pass over the features.

    Args:
        feature_dim: d.
        hidden_size: h; 0 is the plain linear scorer LayerNorm, Linear(d, 1).
    """

    def __init__(self, feature_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_dim)
        self.hidden = nn.Linear(feature_dim, hidden_size) if hidden_size else None
        self.out = nn.Linear(hidden_size or feature_dim, 1)

    def weights(self) -> ScorerWeights:
        """The parameters in fp32, as the kernels take them."""
        hidden = self.hidden
        return ScorerWeights(
            norm_weight=self.norm.weight.float(),
            norm_bias=self.norm.bias.float(),
            hidden_weight=None if hidden is None else hidden.weight.float(),
            hidden_bias=None if hidden is None else hidden.bias.float(),
            out_weight=self.out.weight[0].float(),
            out_bias=self.out.bias[0].float(),
            norm_eps=self.norm.eps,
        )

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores fp32 [..., n] of features [..., n, d]; no patch sees another, so `mask` changes nothing."""
        flat = features.reshape(-1, features.shape[-1])
        return apply_scorer(flat, self.weights()).view(features.shape[:-1])


class ContextScorer(nn.Module):
    """LayerNorm, Linear(d, w), Transformer encoder blocks over all patches of the slide, LayerNorm, Linear(w, 1).

    The paper's other reading («lightweight Transformer encoder blocks»; its parent DiffPrune, arXiv 2605.28051, has 2
    of width 1024 with 16 heads). Every patch attends to every other, without position encoding: time grows with N^2,
    memory with N * w. For slides of some thousand patches, or on a GPU.

    Args:
        feature_dim: d.
        hidden_size: w, a multiple of num_heads.
        num_layers: blocks.
        num_heads: None: heads of 64, at least one.
    """

    def __init__(self, feature_dim: int, hidden_size: int, num_layers: int = 2, num_heads: int | None = None) -> None:
        super().__init__()
        num_heads = num_heads or max(1, hidden_size // 64)
        if hidden_size < 1 or hidden_size % num_heads:
            raise CheckpointError(
                f"scorer.hidden_size: found {hidden_size}, wanted a multiple of num_heads ({num_heads})"
            )
        self.feature_dim, self.hidden_size = feature_dim, hidden_size
        self.input_norm = nn.LayerNorm(feature_dim)
        self.input = nn.Linear(feature_dim, hidden_size)
        self.blocks = nn.ModuleList(_ContextBlock(hidden_size, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.out = nn.Linear(hidden_size, 1)

    def embed(self, features: Tensor) -> Tensor:
        """Tokens [..., n, w] of features [..., n, d] of any floating dtype, each patch by itself."""
        return self.input(self.input_norm(features.to(self.input.weight.dtype)))

    def score_tokens(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores fp32 [..., n] of all tokens [..., n, w] of a slide; NaN where a token is not finite.

        No other token sees such a one, because its NaN would spread to all.

        Args:
            mask: bool [..., n], False where a token is padding that no other may see; None: none is.
        """
        finite = torch.isfinite(tokens).all(dim=-1)
        if not finite.all():
            tokens = tokens.masked_fill(~finite[..., None], 0)
            mask = finite if mask is None else mask & finite
        return self._score_finite(tokens, mask).masked_fill(~finite, torch.nan)

    def _score_finite(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if tokens.ndim == 2:  # without a batch, PyTorch's attention takes the path that needs N * N memory
            if mask is None:
                return self._score_finite(tokens[None], None)[0]
            scores = tokens.new_zeros(len(tokens), dtype=torch.float32)
            scores[mask] = self._score_finite(tokens[mask][None], None)[0]
            return scores
        keys = None if mask is None else mask[..., None, None, :]
        for block in self.blocks:
            tokens = block(tokens, keys)
        return self.out(self.norm(tokens))[..., 0].float()

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores fp32 [..., n] of features [..., n, d]; `mask` as in `score_tokens`."""
        return self.score_tokens(self.embed(features), mask)


class _ContextBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, with residuals."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.up, self.down = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def extra_repr(self) -> str:
        """What no weight tells; `scorer_digest` reads it."""
        return f"num_heads={self.num_heads}"

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (part.transpose(-3, -2) for part in qkv.unbind(dim=-3))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.attention_out(attended.transpose(-3, -2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


Scorer: TypeAlias = PatchScorer | ContextScorer | QuestionScorer
SCORERS: dict[str, type[Scorer]] = {"patch": PatchScorer, "context": ContextScorer, "question": QuestionScorer}
OPTIONS = {
    "patch": frozenset[str](),
    "context": frozenset(("num_layers", "num_heads")),
    "question": frozenset(("rank", "free_tokens", "text_size", "num_slide_tokens")),
}


def build_scorer(kind: str, feature_dim: int, hidden_size: int, **options: int) -> Scorer:
    """The scorer that a checkpoint's `scorer` entry describes.

    Raises:
        CheckpointError: an unknown kind, or options that it does not have.
    """
    if kind not in SCORERS:
        raise CheckpointError(f"scorer.kind: found {kind!r}, wanted one of {', '.join(SCORERS)}")
    known = OPTIONS[kind]
    if unknown := options.keys() - known:
        found, wanted = ", ".join(sorted(unknown)), ", ".join(sorted(known)) or "none"
        raise CheckpointError(f"scorer: found {found} beside kind {kind!r} and hidden_size, wanted {wanted}")
    return SCORERS[kind](feature_dim, hidden_size, **options)


def seeded_scorer(kind: str, feature_dim: int, hidden_size: int, seed: int, **options: int) -> Scorer:
    """An untrained scorer whose weights follow from the seed; leaves torch's own random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_scorer(kind, feature_dim, hidden_size, **options)


FrozenScorer: TypeAlias = ScorerWeights | ContextScorer | QuestionScorer
"""A scorer without gradients, as a selector runs it."""


def frozen_scorer(scorer: Scorer) -> FrozenScorer:
    """A scorer's present weights, which later training does not change."""
    if isinstance(scorer, PatchScorer):
        return scorer.weights().map(lambda one: one.detach().clone())
    return copy.deepcopy(scorer).float().eval().requires_grad_(False)


def scorer_digest(scorer: FrozenScorer) -> str:
    """Tells one scorer from another."""
    parts = [repr(scorer), *scorer.state_dict().values()] if isinstance(scorer, nn.Module) else scorer
    digest = hashlib.blake2b(digest_size=16)
    for value in parts:
        digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


class SlideScores(NamedTuple):
    """Scores of padded slides in memory."""

    scores: Tensor  # fp32 [..., n]; any value where the mask is False
    mask: Tensor  # bool [..., n]: the patches that may be kept
    free: Tensor | None = None  # fp32 [..., n] of a `QuestionScorer`, by the query without a question


def score_slides(scorer: Scorer, features: Tensor, mask: Tensor, query: Tensor | None = None) -> SlideScores:
    """Scores whole slides for training, by the rule of `SlideSelector`: a patch whose score is not finite is left out.

    In fp32 also under autocast, because bf16 would give thousands of patches the same score. A patch that is left out
    has no part in the gradient.

    Args:
        features: [..., n, d], of any floating dtype.
        mask: bool [..., n], False at padding.
        query: [..., R], of a `QuestionScorer`.
    """

    def measured(x: Tensor, of: Tensor) -> Tensor:
        return scorer.vectors(x) if isinstance(scorer, QuestionScorer) else scorer(x, of)[..., None]

    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        found = measured(features, mask)
        kept = mask & torch.isfinite(found).all(dim=-1)
        if not torch.equal(kept, mask):  # once more without them: 0 * NaN in a gradient is NaN
            found = measured(features.masked_fill(~kept[..., None], 0), kept)
        if not isinstance(scorer, QuestionScorer):
            return SlideScores(found[..., 0], kept)
        free = vector_scores(found, scorer.free_query)
        return SlideScores(free if query is None else vector_scores(found, query), kept, free)
