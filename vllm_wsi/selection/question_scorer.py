"""The scorer that hears the question: s_i = a(q) . phi(x_i)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_wsi.errors import CheckpointError
from vllm_wsi.kernels import ScorerWeights, block_rows
from vllm_wsi.kernels.reference import score_vectors

QUERY_HIDDEN = 64
LOWEST = -1e9


class QuestionScorer(nn.Module):
    """Scores a patch by its vector phi(x) and a query a(q), which a question makes.

    phi is a `PatchScorer` with R outputs instead of one: it is computed once for a slide, and a question then costs
    one product [N, R] x [R]. a(q) pools the token embeddings of the question, of the decoder's own table. A second,
    learned query asks nothing: it scores the patches that are shown whatever is asked. With R = 1 and a query of 1 it
    is a `PatchScorer`.

    Args:
        feature_dim: d.
        hidden_size: h of phi; 0: phi is linear.
        text_size: of the decoder's token embeddings.
        rank: R.
        free_tokens: of the K kept patches, those that the query without a question chooses. Where fewer than K are
            asked for, their share of K stays about the same (`free_of`).
        num_slide_tokens: K, of which `free_tokens` are a part.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_size: int,
        text_size: int,
        rank: int = 16,
        free_tokens: int = 8,
        num_slide_tokens: int = 32,
    ) -> None:
        super().__init__()
        if rank < 1 or not 0 <= free_tokens <= num_slide_tokens:
            raise CheckpointError(
                f"scorer: found rank {rank} and free_tokens {free_tokens}, "
                f"wanted at least 1, and 0 .. {num_slide_tokens} (num_slide_tokens)"
            )
        self.rank, self.free_tokens, self.num_slide_tokens = rank, free_tokens, num_slide_tokens
        self.norm = nn.LayerNorm(feature_dim)
        self.hidden = nn.Linear(feature_dim, hidden_size) if hidden_size else None
        self.out = nn.Linear(hidden_size or feature_dim, rank)
        self.text_norm = nn.LayerNorm(text_size)
        self.text_weight = nn.Linear(text_size, 1)
        self.text_in = nn.Linear(text_size, QUERY_HIDDEN)
        self.text_out = nn.Linear(QUERY_HIDDEN, rank)
        self.free_query = nn.Parameter(torch.randn(rank) * rank**-0.5)

    def extra_repr(self) -> str:
        """What no weight tells; `scorer_digest` reads it."""
        return f"rank={self.rank}, free_tokens={self.free_tokens} of {self.num_slide_tokens}"

    @property
    def feature_dim(self) -> int:
        return self.norm.weight.shape[0]

    @property
    def vector_dtype(self) -> torch.dtype:
        """In which phi is kept: half, unless it is one number, which then is a score."""
        return torch.float16 if self.rank > 1 else torch.float32

    @property
    def block_rows(self) -> int:
        """Rows for which phi is computed at once (`kernels.map_blocks`)."""
        return block_rows(self.feature_dim if self.hidden is None else max(self.feature_dim, self.hidden.out_features))

    def free_of(self, k: int) -> int:
        """How many of k patches the query without a question chooses."""
        return min(k, round(k * self.free_tokens / self.num_slide_tokens))

    def vector_weights(self) -> ScorerWeights:
        """phi's parameters: `out_weight` [R, h], or [R, d] where h = 0."""
        hidden = self.hidden
        return ScorerWeights(
            norm_weight=self.norm.weight.float(),
            norm_bias=self.norm.bias.float(),
            hidden_weight=None if hidden is None else hidden.weight.float(),
            hidden_bias=None if hidden is None else hidden.bias.float(),
            out_weight=self.out.weight.float(),
            out_bias=self.out.bias.float(),
            norm_eps=self.norm.eps,
        )

    def vectors(self, features: Tensor) -> Tensor:
        """phi, fp32 [..., n, R], of features [..., n, d]; NaN by `MAX_MAGNITUDE`."""
        flat = features.reshape(-1, features.shape[-1])
        return score_vectors(flat, self.vector_weights()).view(*features.shape[:-1], self.rank)

    def query(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """a(q), fp32 [..., R], of a question.

        Args:
            tokens: [..., t, text_size], embeddings of its tokens.
            mask: bool [..., t], False at padding.
        """
        normed = self.text_norm(tokens.float())
        # Not by -inf: where there is no token at all, the softmax would be NaN, and so would its gradient.
        share = self.text_weight(normed)[..., 0].masked_fill(~mask, LOWEST).softmax(dim=-1) * mask
        pooled = (share[..., None] * normed).sum(dim=-2)
        return self.text_out(F.gelu(self.text_in(pooled)))

    def forward(self, features: Tensor, mask: Tensor | None = None, query: Tensor | None = None) -> Tensor:
        """Scores fp32 [..., n] of features [..., n, d] by a query [..., R]; None: by the one without a question."""
        query = self.free_query if query is None else query
        return vector_scores(self.vectors(features), query)


def vector_scores(vectors: Tensor, query: Tensor) -> Tensor:
    """Scores fp32 [..., n] of vectors [..., n, R] by a query [..., R]. Each is a sum of its own: its bits depend on no
    other patch."""
    if vectors.shape[-1] == 1:
        return vectors[..., 0].float() * query[..., None, 0]
    return (vectors.float() * query[..., None, :]).sum(dim=-1)
