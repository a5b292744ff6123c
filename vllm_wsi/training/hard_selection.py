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

from .dataset import TrainingSlide

CACHE_BYTES = 256 << 20
Asked = tuple[SlideSource, tuple[int, ...] | None]
"""A slide and the tokens of the question about it; None where the scorer hears none."""


class HardSelection:
    """The K best patches of slides by a scorer's present weights, as `SlideSelector` keeps them; on the CPU.

    What it keeps of a slide it remembers (256 MiB, in each process that reads slides), so that the slide need not be
    read again while that process lives.

    Args:
        num_slide_tokens: K.
        embeddings: [vocabulary, hidden], the decoder's token embeddings, for a scorer that hears the question.
    """

    def __init__(self, scorer: Scorer, num_slide_tokens: int, embeddings: Tensor | None = None) -> None:
        self._scorer, self._num_slide_tokens = frozen_scorer(scorer).to("cpu"), num_slide_tokens
        self._embeddings = None if embeddings is None else embeddings.detach().cpu()
        self._kept: LRUCache[Asked, TrainingSlide] = LRUCache(CACHE_BYTES, getsizeof=_num_bytes)

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
        rows, num_candidates = best_rows(slide.features, self._scorer, self._num_slide_tokens, self._query(question))
        if not len(rows):
            raise SlideError(f"{source.name}: features: found no patch with a finite score, wanted at least one")
        kept = TrainingSlide(slide.features[rows], slide.indices[rows], slide.num_patches, num_candidates)
        if slide.num_patches <= longest and _num_bytes(kept) <= CACHE_BYTES:
            self._kept[asked] = kept
        return kept

    @torch.no_grad()
    def _query(self, question: Sequence[int] | None) -> Tensor | None:
        if question is None or not isinstance(self._scorer, QuestionScorer):
            return None
        assert self._embeddings is not None
        tokens = self._embeddings[torch.tensor(question)]
        return self._scorer.query(tokens, torch.ones(len(tokens), dtype=torch.bool))


def _num_bytes(slide: TrainingSlide) -> int:
    return slide.features.nbytes + slide.indices.nbytes
