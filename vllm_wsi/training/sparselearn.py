"""SparseLearn's training path: Soft Top-K, variance-preserving noise gate, diagonal denoiser (arXiv 2606.08641).

Every patch reaches the decoder as a mixture of its features and noise. The gate's share alpha of the features rises
with the patch's score, and all shares of a slide sum to K. So the loss of the answer teaches the scorer which patches
to keep. Inference uses none of this: the scorer chooses by Hard Top-K, and the kept features are clean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vllm_wsi.settings import Settings

from .soft_topk import soft_topk

ALPHA_FLOOR = 1e-6
"""A smaller share counts as 0, because the derivative of its square root grows without bound."""


class SparseLearnSettings(Settings, frozen=True):
    """The training path, its schedules and the switches of its ablations."""

    num_slide_tokens: int = Field(32, ge=1)
    """K, the `num_slide_tokens` of the checkpoint."""
    gate: Literal["noise", "scale", "none"] = "noise"
    """`noise` (the paper's), `scale` (alpha * x, without noise), `none` (every patch as it is: the scorer learns
    nothing)."""
    denoiser: Literal["diagonal", "global", "none"] = "diagonal"
    """`diagonal` (the paper's), `global` (patches attend to each other), `none`."""
    relaxation: Literal["lapsum", "gumbel"] = "lapsum"
    """`lapsum` (Soft Top-K) or `gumbel` (Hard Top-K of scores with Gumbel noise, and the gradient of the Soft Top-K:
    straight-through)."""
    tau_start: float = Field(2.0, gt=0)
    """Temperature at the start; falls to `tau_end` on a cosine."""
    tau_end: float = Field(0.1, gt=0)
    """Temperature at the end."""
    tau_fraction: float = Field(0.8, ge=0, le=1)
    """Share of the steps over which the temperature falls."""
    k_start: int = Field(256, ge=1)
    """K at the start; falls geometrically to `k_end`. If K is small against N from the first step on, the gradient
    vanishes for some seeds."""
    k_end: int | None = Field(None, ge=1)
    """K at the end; none: `num_slide_tokens`. If K stays large against N, the scorer never learns to separate patches
    sharply. What counts is K / N: a smaller `k_end` prepares for slides that are longer than those of the training."""
    k_fraction: float = Field(0.6, ge=0, le=1)
    """Share of the steps over which K falls."""

    def tau(self, progress: float) -> float:
        """Temperature after a share `progress` of the steps."""
        turn = min(1.0, progress / self.tau_fraction) if self.tau_fraction else 1.0
        return self.tau_end + (self.tau_start - self.tau_end) * (1 + math.cos(math.pi * turn)) / 2

    def k(self, progress: float) -> int:
        """K after a share `progress` of the steps."""
        end = self.num_slide_tokens if self.k_end is None else self.k_end
        if self.k_start <= end:
            return end
        turn = min(1.0, progress / self.k_fraction) if self.k_fraction else 1.0
        return max(end, int(self.k_start * (end / self.k_start) ** turn))


class Gated(NamedTuple):
    """What the projector receives in training."""

    features: Tensor  # fp32 [B, N, d]; whatever at padding
    alpha: Tensor  # fp32 [B, N], 0 at padding, sums to min(K, patches); to less, where two queries share K


class SparseLearn(nn.Module):
    """Gates and denoises patches by their scores. It is used in training only; `eval()` does not switch it off.

    `tau` and `num_slide_tokens` follow `set_progress`, and are buffers, so that a resumed run goes on where it was.

    Args:
        feature_dim: d.
        settings: of the gate, its denoiser and its schedules.
        previous: the gate of the stage before; its denoiser's weights are taken over where both denoisers are of one
            kind.
    """

    tau: Tensor
    num_slide_tokens: Tensor

    def __init__(self, feature_dim: int, settings: SparseLearnSettings, previous: SparseLearn | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.denoiser = None if settings.denoiser == "none" else Denoiser(feature_dim, settings.denoiser == "global")
        trained = None if previous is None or previous.settings.denoiser != settings.denoiser else previous.denoiser
        if self.denoiser is not None and trained is not None:
            self.denoiser.load_state_dict(trained.state_dict())
        self.register_buffer("tau", torch.tensor(settings.tau(0.0)))
        self.register_buffer("num_slide_tokens", torch.tensor(settings.k(0.0)))

    def set_progress(self, progress: float) -> None:
        """Sets tau and K for the next step; `progress` is the share of the steps already done."""
        self.tau.fill_(self.settings.tau(progress))
        self.num_slide_tokens.fill_(self.settings.k(progress))

    def forward(
        self, features: Tensor, scores: Tensor, mask: Tensor, free: Tensor | None = None, free_share: float = 0.0
    ) -> Gated:
        """Gates patches.

        With `free`, two Soft Top-K share out K: (1 - `free_share`) K by the scores, the rest by `free`. Of a patch that
        both show a share of, 1 - (1 - alpha_1)(1 - alpha_2) is shown, so the shares sum to K at most.

        Args:
            features: [B, N, d], each patch of mean 0 and variance 1 (`SlideProjector.normalise`).
            scores: [B, N], as the scorer gives them.
            mask: bool [B, N], False at padding.
            free: [B, N], scores by the query without a question (`QuestionScorer`).
        """
        k = int(self.num_slide_tokens)
        num_free = 0 if free is None else min(k, round(k * free_share))
        rows = [(one, count) for one, count in ((scores, k - num_free), (free, num_free)) if one is not None and count]
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            alpha, signal, noise = self._shares([(standardise(one.float(), mask), count) for one, count in rows], mask)
            if self.settings.gate == "noise":
                gated = signal[..., None] * features + noise[..., None] * torch.randn_like(features)
            elif self.settings.gate == "scale":
                gated = alpha[..., None] * features
            else:
                gated = features
            if self.denoiser is not None:
                gated = self.denoiser(gated, mask)
        return Gated(gated, alpha)

    def _shares(self, rows: Sequence[tuple[Tensor, int]], mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sqrt(alpha), sqrt(1 - alpha)); where straight-through, hard values with soft gradients.

        Args:
            rows: standardised scores [B, N], and how many patches are kept by them.
        """
        tau = float(self.tau)
        if self.settings.relaxation == "lapsum":
            alpha = _together([soft_topk(scores, k, tau, mask) for scores, k in rows])
            return alpha, _root(alpha), _root(1 - alpha)
        noisy = []
        for scores, k in rows:
            uniform = torch.rand_like(scores).clamp(1e-9, 1 - 1e-7)
            noisy.append((scores - tau * torch.log(-torch.log(uniform)), k))
        soft = _together([soft_topk(scores, k, tau, mask) for scores, k in noisy])
        hard = _together([hard_topk(scores, k, mask) for scores, k in noisy])
        pairs = ((hard, soft), (hard, _root(soft)), (1 - hard, _root(1 - soft)))
        alpha, signal, noise = (value + (gradient - gradient.detach()) for value, gradient in pairs)
        return alpha, signal, noise


class Denoiser(nn.Module):
    """One pre-norm Transformer encoder block over gated patches, the identity until it is trained.

    Diagonal (the paper's): the attention mask is the identity, so a patch sees itself alone and the softmax over one
    key is 1: x + W_o W_v LN(x), then + FFN(LN(x)). Global: ordinary attention over the slide's patches.
    """

    def __init__(self, feature_dim: int, is_global: bool = False, head_dim: int = 64) -> None:
        super().__init__()
        heads = max(1, feature_dim // head_dim)
        self.num_heads = next(count for count in range(heads, 0, -1) if feature_dim % count == 0)
        self.value_norm, self.mlp_norm = nn.LayerNorm(feature_dim), nn.LayerNorm(feature_dim)
        self.query_key = nn.Linear(feature_dim, 2 * feature_dim) if is_global else None
        self.value, self.out = nn.Linear(feature_dim, feature_dim), nn.Linear(feature_dim, feature_dim)
        self.up, self.down = nn.Linear(feature_dim, 4 * feature_dim), nn.Linear(4 * feature_dim, feature_dim)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, N, d] of [B, N, d]; `mask` is bool [B, N], False where a patch is padding."""
        normed = self.value_norm(x)
        value = self.value(normed)
        if self.query_key is not None:
            query, key = self.query_key(normed).chunk(2, dim=-1)
            q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
            value = attended.transpose(1, 2).flatten(2)
        x = x + self.out(value)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def standardise(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores [B, N] of each slide with mean 0 and variance 1 over its patches; 0 at padding."""
    count = mask.sum(dim=-1, keepdim=True).clamp_min(1)
    scores = scores.masked_fill(~mask, 0)
    centred = (scores - scores.sum(dim=-1, keepdim=True) / count).masked_fill(~mask, 0)
    variance = centred.square().sum(dim=-1, keepdim=True) / count
    return centred * torch.rsqrt(variance + 1e-6)


def hard_topk(scores: Tensor, k: int, mask: Tensor) -> Tensor:
    """fp32 [B, N]: 1 on the k best patches of each slide (all, where there are no more), else 0; ties to the lower."""
    order = scores.masked_fill(~mask, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    best = torch.zeros_like(scores).scatter_(-1, order[..., :k], 1.0)
    return best * mask


def _together(shares: Sequence[Tensor]) -> Tensor:
    """What is shown of patches [B, N] of which each member of `shares` shows a share by itself."""
    if len(shares) == 1:
        return shares[0]
    hidden = torch.ones_like(shares[0])
    for share in shares:
        hidden = hidden * (1 - share)
    return 1 - hidden


def _root(share: Tensor) -> Tensor:
    return torch.sqrt(share.clamp_min(ALPHA_FLOOR)) * (share > ALPHA_FLOOR)
