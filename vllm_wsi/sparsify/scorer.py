"""The learned scorer: one number for each patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_wsi.kernels import ScorerWeights
from vllm_wsi.kernels.reference import apply_scorer


class PatchScorer(nn.Module):
    """s = Linear(h, 1)(GELU(Linear(d, h)(LayerNorm(x)))), each patch by itself (SparseLearn, scorer S).

    The paper's per-patch reading: it scales to 100,000 patches and fuses into one pass over the features.

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

    def forward(self, features: Tensor) -> Tensor:
        """Scores fp32 [..., n] of features [..., n, d]; padding is the caller's to mask."""
        flat = features.reshape(-1, features.shape[-1])
        return apply_scorer(flat, self.weights()).view(features.shape[:-1])


def build_scorer(kind: str, feature_dim: int, hidden_size: int) -> PatchScorer:
    """The scorer that a checkpoint's `scorer` entry names."""
    if kind != "patch":
        raise ValueError(f"scorer.kind: found {kind!r}, wanted 'patch'")
    return PatchScorer(feature_dim, hidden_size)


def seeded_scorer(kind: str, feature_dim: int, hidden_size: int, seed: int) -> PatchScorer:
    """An untrained scorer whose weights follow from the seed; leaves torch's own random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_scorer(kind, feature_dim, hidden_size)
