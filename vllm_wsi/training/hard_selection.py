"""The slides of a hard stage: the patches that service would show the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from cachetools import LRUCache
from torch import Tensor

from vllm_wsi.errors import SlideError
from vllm_wsi.questions.items import SlideSource
from vllm_wsi.selection.best_rows import best_rows
from vllm_wsi.selection.question_scorer import QuestionScorer
from vllm_wsi.selection.scorer import Scorer, frozen_scorer
from vllm_wsi.selection.slide_pools import open_pools

from .dataset import TrainingSlide

CACHE_BYTES = 256 << 20
SlideQuestion = tuple[SlideSource, tuple[int, ...] | None]
"""A slide and the tokens of the question about it; None where the scorer hears none."""


class HardSelection:
    """The K best patches of slides by a scorer's present weights, as `SlideSelector` keeps them; on the CPU.

    What it keeps of a slide it remembers (256 MiB, in each process that reads slides), so that the slide need not be
    read again while that process lives.

    Args:
        num_slide_tokens: K.
        summary_tokens: S of K, means of the dropped patches.
        embeddings: [vocabulary, hidden], the decoder's token embeddings, for a scorer that hears the question.
    """

    def __init__(
        self, scorer: Scorer, num_slide_tokens: int, embeddings: Tensor | None = None, summary_tokens: int = 0
    ) -> None:
        self._scorer, self._num_kept = frozen_scorer(scorer).to("cpu"), num_slide_tokens - summary_tokens
        self._summary_tokens = summary_tokens
        self._embeddings = None if embeddings is None else embeddings.detach().cpu()
        self._kept: LRUCache[SlideQuestion, TrainingSlide] = LRUCache(CACHE_BYTES, getsizeof=_num_bytes)

    def keep(
        self,
        source: SlideSource,
        read: Callable[[], TrainingSlide],
        longest: int,
        question: Sequence[int] | None = None,
    ) -> TrainingSlide:
        """The best patches, in their order, with their rows among the slide's N.

        Args:
            read: gives the slide's patches.
            longest: a slide of at most this many patches is read alike each time, so that it can be remembered.
            question: its tokens, for a scorer that hears it.

        Raises:
            SlideError: no patch has a finite score.
        """
        asked = source, None if question is None else tuple(question)
        if (kept := self._kept.get(asked)) is not None:
            return kept
        slide = read()
        rows, num_candidates = best_rows(slide.features, self._scorer, self._num_kept, self._query(question))
        if not len(rows):
            raise SlideError(f"{source.name}: features: found no patch with a finite score, wanted at least one")
        features, pooled = slide.features[rows], self._pooled(slide, rows)
        if pooled is not None:
            features = torch.cat((features.float(), pooled))
        num_summary = len(features) - len(rows)
        kept = TrainingSlide(features, slide.indices[rows], slide.num_patches, num_candidates, num_summary)
        if slide.num_patches <= longest and _num_bytes(kept) <= CACHE_BYTES:
            self._kept[asked] = kept
        return kept

    def _pooled(self, slide: TrainingSlide, rows: Tensor) -> Tensor | None:
        if (pools := open_pools(self._summary_tokens, slide.features.shape[1], "cpu")) is None:
            return None
        pools.add(slide.indices, slide.features)
        return pools.without(slide.indices[rows], slide.features[rows]).means()

    @torch.no_grad()
    def _query(self, question: Sequence[int] | None) -> Tensor | None:
        if question is None or not isinstance(self._scorer, QuestionScorer):
            return None
        assert self._embeddings is not None
        tokens = self._embeddings[torch.tensor(question)]
        return self._scorer.query(tokens, torch.ones(len(tokens), dtype=torch.bool))


def _num_bytes(slide: TrainingSlide) -> int:
    return slide.features.nbytes + slide.indices.nbytes
