"""SlideSelector: streams a feature file through the scorer and keeps the best K patches."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vllm_wsi.errors import SettingsError, SlideError, WsiError
from vllm_wsi.kernels import ScorerWeights
from vllm_wsi.kernels.reference import apply_scorer, padded_k
from vllm_wsi.slides import FeatureFile
from vllm_wsi.slides.encoder_names import EncoderCheck, EncoderMatch

from .best_of_file import Kept, best_by_scores, best_in_context, best_in_stream
from .chunk_reader import ChunkReader, read_tensor_rows
from .question_scorer import QuestionScorer
from .question_selection import SlideVectors, best_by_question, slide_vectors
from .score_summary import score_summary
from .scorer import ContextScorer, FrozenScorer
from .scoring_device import Cpu, Place, ScoringDevice
from .selection import Selection
from .slide_pools import SlideScores

T = TypeVar("T")


class SlideSelector:
    """Hard Top-K over a whole slide, chunk by chunk (SparseLearn, inference path).

    Deterministic: the same file and weights give the same bits on every run and for every chunk size, on one device.
    Peak memory is two chunks and the scorer's, and 8 to 16 bytes a patch while coordinates are looked up; a
    `ContextScorer` keeps the slide's tokens too. One selector serves many threads.

    Args:
        scorer: per patch by its weights, or over the whole slide.
        num_slide_tokens: K, of the slide's tokens.
        device: "cpu", "cuda", "cuda:N", or "auto" for a GPU where there is one that is fit; a GPU starts at the first
            slide, or by `start`.
        max_patches: longer slides are refused.
        chunk_rows: rows read at once; None: `ChunkReader` decides by their size.
        encoder: whose features the scorer was trained on, and whether others are refused; None: not known.
        max_slide_tokens: the largest k that `select` is asked for; None: K.
        summary_tokens: S of the k are means of the dropped patches, and k - S patches are kept.

    Raises:
        SettingsError: an unknown device, or S is not below K.
        SetupError: "cuda" where there is none.
    """

    # Many parameters: what a server sets, each with a default.
    def __init__(
        self,
        scorer: FrozenScorer,
        num_slide_tokens: int,
        device: str = "cpu",
        max_patches: int | None = None,
        chunk_rows: int | None = None,
        encoder: EncoderCheck | None = None,
        max_slide_tokens: int | None = None,
        summary_tokens: int = 0,
    ) -> None:
        if not 0 <= summary_tokens < num_slide_tokens:
            raise SettingsError(
                f"num_slide_tokens: found {num_slide_tokens}, wanted more than {summary_tokens} (summary_tokens)"
            )
        self.num_slide_tokens, self.summary_tokens = num_slide_tokens, summary_tokens
        self.feature_dim = scorer.feature_dim
        self.device = ScoringDevice(device)
        self.max_patches, self._chunk_rows = max_patches, chunk_rows
        self.encoder = encoder or EncoderCheck()
        self.scorer = scorer
        self._on_gpu: tuple[Place, FrozenScorer] | None = None
        largest = max(num_slide_tokens, max_slide_tokens or 1)
        self._sizes = sorted({padded_k(k - summary_tokens) for k in (num_slide_tokens, largest)})

    def start(self, rank: int = 0) -> Place:
        """Chooses the device, once; see `ScoringDevice.start`."""
        return self.device.start(self.scorer, self._sizes, rank)

    @torch.no_grad()
    def select(
        self, slide: FeatureFile, k: int | None = None, keep_all_scores: bool = False, query: Tensor | None = None
    ) -> Selection:
        """Keeps the best patches of an open feature file, for k (default K) tokens.

        A GPU that fails leaves the slide to the CPU, and `Selection.fallback` says why.

        Args:
            keep_all_scores: the selection also holds the scores and places of all patches (`Selection.all_scores`), and
                their pools.
            query: fp32 [R], what a `QuestionScorer` made of the question; None: no question is asked.

        Raises:
            SlideError: the slide's d, N or encoder does not fit, no patch has a finite score, or k is not above S.
        """
        k = self.num_slide_tokens if k is None else k
        encoder_match = self.check(slide)
        if isinstance(self.scorer, QuestionScorer):
            found = self.select_of_vectors(slide, self.read_vectors(slide), k, query)
        else:
            found, fallback = self._on_device(lambda place: self._select(slide, k, place))
            found = replace(found, fallback=fallback)
        found = replace(found, encoder_match=encoder_match)
        return found if keep_all_scores else found.without_all_scores()

    def _on_device(self, work: Callable[[Place], T]) -> tuple[T, str | None]:
        """(What it gave, why the CPU did what a GPU should have)."""
        place = self.start()
        try:
            return work(place), None
        except Exception as error:
            if isinstance(error, (WsiError, OSError)) or isinstance(place, Cpu):
                raise
            # A reader's fault comes up on the CPU again, and then the GPU was none.
            return work(Cpu()), self.device.failed(place, error)

    def _select(self, slide: FeatureFile, k: int, place: Place) -> Selection:
        reader = self._reader(slide, place)
        began = time.perf_counter()
        scorer, num_kept = self._scorer_on(place), self._num_kept(k)
        if isinstance(scorer, ContextScorer):
            kept, known = best_in_context(reader, scorer, num_kept, place, self.summary_tokens)
        else:
            assert isinstance(scorer, ScorerWeights)
            kept, known = best_in_stream(reader, scorer, num_kept, place, self.summary_tokens)
        seconds = time.perf_counter() - began
        counts = {"read_seconds": reader.read_seconds, "score_seconds": seconds - reader.read_seconds}
        summary = score_summary(known.scores)
        return _selection(slide, kept, known, summary=summary, scored_on=place.name, **counts)

    def _num_kept(self, k: int) -> int:
        if k <= self.summary_tokens:
            raise SlideError(f"k: found {k}, wanted more than {self.summary_tokens}, the summary tokens of each slide")
        return k - self.summary_tokens

    def select_of_vectors(self, slide: FeatureFile, found: SlideVectors, k: int, query: Tensor | None) -> Selection:
        """As `select`, of a slide that `read_vectors` has just read. With all scores."""
        chosen = self.select_by_scores(slide, found.known, k, found.scored_on, query)
        return replace(
            chosen,
            read_seconds=chosen.read_seconds + found.read_seconds,
            score_seconds=found.score_seconds,
            fallback=found.fallback,
        )

    @torch.no_grad()
    def read_vectors(self, slide: FeatureFile) -> SlideVectors:
        """What a `QuestionScorer` needs of a slide for any question: the slide is read once."""
        assert isinstance(self.scorer, QuestionScorer)
        self.check(slide)

        def read(place: Place) -> SlideVectors:
            scorer, reader = self._scorer_on(place), self._reader(slide, place)
            assert isinstance(scorer, QuestionScorer)
            began = time.perf_counter()
            known = slide_vectors(reader, scorer, place, self.summary_tokens)
            seconds = time.perf_counter() - began - reader.read_seconds
            return SlideVectors(known, place.name, reader.read_seconds, seconds)

        found, fallback = self._on_device(read)
        return found._replace(fallback=fallback)

    def _reader(self, slide: FeatureFile, place: Place) -> ChunkReader:
        return ChunkReader(slide, not isinstance(place, Cpu), self._chunk_rows)

    @torch.no_grad()
    def select_by_scores(
        self,
        slide: FeatureFile,
        known: SlideScores,
        k: int,
        scored_on: str,
        query: Tensor | None = None,
    ) -> Selection:
        """As `select`, by what this scorer gave all patches before; reads the kept rows alone. With all scores.

        Args:
            known: of the whole slide.
            scored_on: the device that gave them.
            query: as in `select`.

        Raises:
            SlideError: as `select`, or there is not one score for each patch.
        """
        encoder_match, num_kept = self.check(slide), self._num_kept(k)
        scores = known.scores
        if len(scores) != slide.num_patches:
            raise SlideError(f"{slide.name}: scores: found {len(scores)}, wanted one for each of {slide.num_patches}")
        began = time.perf_counter()
        if isinstance(self.scorer, QuestionScorer):
            rows, scores, free = best_by_question(self.scorer, scores, num_kept, query)
            kept = Kept(rows, scores[rows], read_tensor_rows(slide, rows))
            summary = score_summary(scores, free)
        else:
            kept = best_by_scores(slide, scores, num_kept)
            summary = score_summary(scores)
        seconds = time.perf_counter() - began
        counts = {"read_seconds": seconds, "scored_on": scored_on, "encoder_match": encoder_match}
        return _selection(slide, kept, known._replace(scores=scores), summary=summary, **counts)

    def _scorer_on(self, place: Place) -> FrozenScorer:
        if isinstance(place, Cpu):
            return self.scorer
        if self._on_gpu is None or self._on_gpu[0] is not place:
            self._on_gpu = (place, copy.deepcopy(self.scorer).to(place.device))
        return self._on_gpu[1]

    @torch.no_grad()
    def rescored(self, chosen: Selection) -> Selection:
        """A selection that something else made, with this scorer's scores of its patches. Left as it is where no patch
        can be scored by itself (`ContextScorer`), or without its question (`QuestionScorer`).

        Raises:
            SlideError: a patch has no finite score.
        """
        if not isinstance(self.scorer, ScorerWeights):
            return chosen
        scores = apply_scorer(chosen.features, self.scorer)
        if not bool(torch.isfinite(scores).all()):
            raise SlideError("Selection: features: found a patch without a finite score, wanted none")
        return replace(chosen, scores=scores)

    def check(self, slide: FeatureFile) -> EncoderMatch:
        """Raises SlideError for features of another width, more patches than `max_patches`, or another encoder's."""
        where = f"{slide.name}: {slide.key or 'features'}: found"
        if slide.feature_dim != self.feature_dim:
            raise SlideError(f"{where} d = {slide.feature_dim}, wanted {self.feature_dim}, as the checkpoint has it")
        if self.max_patches is not None and slide.num_patches > self.max_patches:
            raise SlideError(f"{where} {slide.num_patches} patches, wanted at most {self.max_patches} (max_patches)")
        return self.encoder(slide.name, slide.metadata)


def _selection(slide: FeatureFile, kept: Kept, known: SlideScores, **counts: Any) -> Selection:
    """With the summary tokens, and the scores, places and pools of all patches. Raises SlideError where no patch was
    kept."""
    scores, pools = known
    if not len(kept.indices):
        raise SlideError(
            f"{slide.name}: {slide.key or 'features'}: found no patch with a finite score among "
            f"{slide.num_patches}, wanted at least one; the features hold NaN or infinities"
        )
    num_nonfinite = int((~torch.isfinite(scores)).sum())
    if pools is not None:
        counts |= {"pools": pools, "pooled": pools.without(kept.indices, kept.features).means()}
    return Selection.of(slide, *kept, all_scores=scores, num_nonfinite=num_nonfinite, **counts)
