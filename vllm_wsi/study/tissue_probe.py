"""What labels teach: a linear classifier of single patches, as the ceiling for a scorer that learned from answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_wsi.errors import needs_extra
from vllm_wsi.kernels.keys import pack_keys, unpack_keys
from vllm_wsi.selection.baselines import Policy
from vllm_wsi.selection.patch_matrix import Patches
from vllm_wsi.tissue.pooled_slides import PatchPool

INVERSE_PENALTY = 1e-3  # C of the logistic regression, on features of variance 1 in one view
ITERATIONS = 300


@dataclass(frozen=True)
class LinearProbe(Policy):
    """The patches with the highest logit of a linear classifier, which is their score.

    Args:
        weight: fp32 [d].
        bias: a number.
    """

    weight: Tensor
    bias: float

    def score(self, features: Tensor) -> Tensor:
        """Logits fp32 [n] of features [n, d]."""
        return features.float() @ self.weight + self.bias

    def _pick(self, patches: Patches, k: int) -> tuple[Tensor, Tensor]:
        return unpack_keys(torch.topk(pack_keys(self.score(patches.features)), k).values)


def fit_probe(pool: PatchPool, is_positive: NDArray[np.bool_], num_slide_tokens: int) -> LinearProbe:
    """A logistic regression on all patches of a pool, in all of its views.

    Args:
        is_positive: [n], of all patches that the pool's features hold.

    Raises:
        SetupError: scikit-learn is not installed.
    """
    with needs_extra("study"):
        from sklearn.linear_model import LogisticRegression
    x = np.concatenate([view[pool.rows] for view in pool.views]).astype(np.float32)
    y = np.tile(is_positive[pool.rows], len(pool.views))
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.where(spread > 0, spread, 1)
    x = (x - mean) / spread
    fitted = LogisticRegression(C=INVERSE_PENALTY / len(pool.views), max_iter=ITERATIONS).fit(x, y)
    weight = fitted.coef_[0] / spread
    bias = float(fitted.intercept_[0] - mean @ weight)
    return LinearProbe(num_slide_tokens, torch.from_numpy(weight.astype(np.float32)), bias)
