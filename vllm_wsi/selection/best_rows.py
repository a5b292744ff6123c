"""Which patches `SlideSelector` keeps of a slide whose features are in memory, for training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_wsi.kernels import block_rows, map_blocks, score_topk, select_topk

from .question_scorer import QuestionScorer
from .question_selection import best_by_question
from .scorer import ContextScorer, FrozenScorer


class BestRows(NamedTuple):
    """What `SlideSelector` keeps of a slide whose features are in memory."""

    rows: Tensor  # int64 [m], ascending; m = min(k, num_candidates), and may be 0
    num_candidates: int  # patches with a finite score


@torch.no_grad()
def best_rows(features: Tensor, scorer: FrozenScorer, k: int, query: Tensor | None = None) -> BestRows:
    """The best k of features [n, d].

    Args:
        query: fp32 [R], what a `QuestionScorer` made of the question; None: no question is asked.
    """
    if isinstance(scorer, QuestionScorer):
        vectors = torch.empty(len(features), scorer.rank, device=features.device)
        map_blocks(features, 0, scorer.vectors, vectors, scorer.block_rows)
        best = best_by_question(scorer, vectors.to(scorer.vector_dtype), k, query)
        return BestRows(best.rows, int(torch.isfinite(best.scores).sum()))
    if isinstance(scorer, ContextScorer):
        tokens = torch.empty(len(features), scorer.hidden_size, device=features.device)
        map_blocks(features, 0, scorer.embed, tokens, block_rows(max(scorer.feature_dim, scorer.hidden_size)))
        scores = scorer.score_tokens(tokens)
        indices = select_topk(scores, k).indices[0]
    else:
        selected = score_topk(features, scorer, k)
        scores, indices = selected.all_scores, selected.indices[0]
    return BestRows(indices[indices >= 0], int(torch.isfinite(scores).sum()))
