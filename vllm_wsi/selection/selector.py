"""SlideSelector: streams a feature file through the scorer and keeps the best K patches."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vllm_wsi.errors import SlideError, WsiError
from vllm_wsi.kernels import ScoredTopK, ScorerWeights, block_rows, map_blocks, score_topk, select_topk
from vllm_wsi.kernels.reference import apply_scorer, padded_k
from vllm_wsi.slides import FeatureFile
from vllm_wsi.slides.encoder_names import EncoderCheck, EncoderMatch

from .chunk_reader import ChunkReader, read_tensor_rows
from .question_scorer import QuestionScorer
from .question_selection import SlideVectors, best_by_question, slide_vectors
from .score_summary import score_summary
from .scorer import ContextScorer, FrozenScorer
from .scoring_device import Cpu, Place, ScoringDevice
from .selection import Selection

T = TypeVar("T")


class SlideSelector:
    """Hard Top-K over a whole slide, chunk by chunk (SparseLearn, inference path).

    Deterministic: the same file and weights give the same bits on every run and for every chunk size, on one device.
    Peak memory is two chunks and the scorer's, and 8 to 16 bytes a patch while coordinates are looked up; a
    `ContextScorer` keeps the slide's tokens too. One selector serves many threads.

    Args:
        scorer: per patch by its weights, or over the whole slide.
        num_slide_tokens: K.
        device: "cpu", "cuda", "cuda:N", or "auto" for a GPU where there is one that is fit; a GPU starts at the first
            slide, or by `start`.
        max_patches: longer slides are refused.
        chunk_rows: rows read at once; None: `ChunkReader` decides by their size.
        encoder: whose features the scorer was trained on, and whether others are refused; None: not known.
        max_slide_tokens: the largest k that `select` is asked for; None: K.

    Raises:
        SettingsError: an unknown device.
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
    ) -> None:
        self.num_slide_tokens = num_slide_tokens
        self.feature_dim = scorer.feature_dim
        self.device = ScoringDevice(device)
        self.max_patches, self._chunk_rows = max_patches, chunk_rows
        self.encoder = encoder or EncoderCheck()
        self.scorer = scorer
        self._on_gpu: tuple[Place, FrozenScorer] | None = None
        self._sizes = sorted({padded_k(k) for k in (num_slide_tokens, max_slide_tokens or 1)})

    def start(self, rank: int = 0) -> Place:
        """Chooses the device, once; see `ScoringDevice.start`."""
        return self.device.start(self.scorer, self._sizes, rank)

    @torch.no_grad()
    def select(
        self, slide: FeatureFile, k: int | None = None, keep_all_scores: bool = False, query: Tensor | None = None
    ) -> Selection:
        """Keeps the best k (default K) patches of an open feature file.

        A GPU that fails leaves the slide to the CPU, and `Selection.fallback` says why.

        Args:
            keep_all_scores: the selection also holds the scores and places of all patches (`Selection.all_scores`).
            query: fp32 [R], what a `QuestionScorer` made of the question; None: no question is asked.

        Raises:
            SlideError: the slide's d, N or encoder does not fit, or no patch has a finite score.
        """
        k = self.num_slide_tokens if k is None else k
        encoder_match = self._check(slide)
        if isinstance(self.scorer, QuestionScorer):
            found = self.select_of_vectors(slide, self.read_vectors(slide), k, query)
        else:
            found, fallback = self._on_device(lambda place: self._select(slide, k, place))
            found = replace(found, fallback=fallback)
        found = replace(found, encoder_match=encoder_match)
        return found if keep_all_scores else replace(found, all_scores=None, all_coords=None)

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
        scorer = self._scorer_on(place)
        if isinstance(scorer, ContextScorer):
            kept, scores = _select_in_context(reader, scorer, k, place)
        else:
            assert isinstance(scorer, ScorerWeights)
            kept, scores = _select_in_stream(reader, scorer, k, place)
        seconds = time.perf_counter() - began
        counts = {"read_seconds": reader.read_seconds, "score_seconds": seconds - reader.read_seconds}
        return _selection(slide, kept, scores, summary=score_summary(scores), scored_on=place.name, **counts)

    def select_of_vectors(self, slide: FeatureFile, found: SlideVectors, k: int, query: Tensor | None) -> Selection:
        """As `select`, of a slide that `read_vectors` has just read. With all scores."""
        chosen = self.select_by_scores(slide, found.vectors, k, found.scored_on, query)
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
        self._check(slide)

        def read(place: Place) -> SlideVectors:
            scorer, reader = self._scorer_on(place), self._reader(slide, place)
            assert isinstance(scorer, QuestionScorer)
            began = time.perf_counter()
            vectors = slide_vectors(reader, scorer, place)
            seconds = time.perf_counter() - began - reader.read_seconds
            return SlideVectors(vectors, place.name, reader.read_seconds, seconds)

        found, fallback = self._on_device(read)
        return found._replace(fallback=fallback)

    def _reader(self, slide: FeatureFile, place: Place) -> ChunkReader:
        return ChunkReader(slide, not isinstance(place, Cpu), self._chunk_rows)

    @torch.no_grad()
    def select_by_scores(
        self,
        slide: FeatureFile,
        scores: Tensor,
        k: int,
        scored_on: str,
        query: Tensor | None = None,
    ) -> Selection:
        """The best k by what this scorer gave all patches before; reads the kept rows alone. With all scores.

        Args:
            scores: fp32 [N]; of a `QuestionScorer` the patches' vectors [N, R].
            scored_on: the device that gave them.
            query: as in `select`.

        Raises:
            SlideError: as `select`, or there is not one score for each patch.
        """
        encoder_match = self._check(slide)
        if len(scores) != slide.num_patches:
            raise SlideError(f"{slide.name}: scores: found {len(scores)}, wanted one for each of {slide.num_patches}")
        began = time.perf_counter()
        if isinstance(self.scorer, QuestionScorer):
            rows, scores, free = best_by_question(self.scorer, scores, k, query)
            kept = _Kept(rows, scores[rows], read_tensor_rows(slide, rows))
            summary = score_summary(scores, free)
        else:
            kept = _kept_by_scores(slide, scores, k)
            summary = score_summary(scores)
        seconds = time.perf_counter() - began
        counts = {"read_seconds": seconds, "scored_on": scored_on, "encoder_match": encoder_match}
        return _selection(slide, kept, scores, summary=summary, **counts)

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

    def _check(self, slide: FeatureFile) -> EncoderMatch:
        where = f"{slide.name}: {slide.key or 'features'}: found"
        if slide.feature_dim != self.feature_dim:
            raise SlideError(f"{where} d = {slide.feature_dim}, wanted {self.feature_dim}, as the checkpoint has it")
        if self.max_patches is not None and slide.num_patches > self.max_patches:
            raise SlideError(f"{where} {slide.num_patches} patches, wanted at most {self.max_patches} (max_patches)")
        return self.encoder(slide.name, slide.metadata)


class _Kept(NamedTuple):
    """On the CPU, without the places that no patch took."""

    indices: Tensor
    scores: Tensor
    features: Tensor


_launching = threading.Lock()
"""Around the launches of a GPU's threads: what two of them need compiled is compiled once."""


def _select_in_stream(reader: ChunkReader, weights: ScorerWeights, k: int, place: Place) -> tuple[_Kept, Tensor]:
    """Chunk by chunk with a running Top-K; also the scores of all patches, on the CPU."""

    def score_chunk(start: int, chunk: Tensor, running: ScoredTopK | None) -> ScoredTopK:
        x = chunk.to(place.device, non_blocking=True)
        with contextlib.nullcontext() if isinstance(place, Cpu) else _launching:
            found = score_topk(x, weights, k, first_row=start, running=running)
        scores[start : start + len(chunk)] = found.all_scores.cpu()
        return found

    scores = torch.empty(reader.num_patches)
    running: Future[ScoredTopK] | None = None
    for start, chunk in reader.chunks():
        # One chunk is scored while the next is read; its buffer is free when the one after that is asked for.
        running = place.run(score_chunk, start, chunk, None if running is None else running.result())
    assert running is not None
    best = running.result()
    present = best.indices[0].cpu() >= 0
    return _Kept(*(x[0].cpu()[present] for x in (best.indices, best.scores, best.rows))), scores


def _select_in_context(reader: ChunkReader, scorer: ContextScorer, k: int, place: Place) -> tuple[_Kept, Tensor]:
    """Tokens of all patches, then the blocks, then Top-K; the kept rows are read once more."""

    def embed_chunk(start: int, chunk: Tensor) -> None:
        out = tokens[start : start + len(chunk)]
        map_blocks(chunk.to(place.device, non_blocking=True), start, scorer.embed, out, rows)

    tokens = torch.empty(reader.num_patches, scorer.hidden_size, device=place.device)
    rows = block_rows(max(scorer.feature_dim, scorer.hidden_size))
    done: Future[None] | None = None
    for start, chunk in reader.chunks():
        if done is not None:
            done.result()
        done = place.run(embed_chunk, start, chunk)
    assert done is not None
    done.result()
    scores = place.run(scorer.score_tokens, tokens).result().cpu()
    return _kept_by_scores(reader.slide, scores, k), scores


def _kept_by_scores(slide: FeatureFile, scores: Tensor, k: int) -> _Kept:
    """The best k by the scores of all patches; their rows are read."""
    selected = select_topk(scores, k)
    present = selected.indices[0] >= 0
    indices = selected.indices[0][present]
    return _Kept(indices, selected.scores[0][present], read_tensor_rows(slide, indices))


def _selection(slide: FeatureFile, kept: _Kept, scores: Tensor, **counts: Any) -> Selection:
    """With the scores and places of all patches. Raises SlideError where no patch was kept."""
    if not len(kept.indices):
        raise SlideError(
            f"{slide.name}: {slide.key or 'features'}: found no patch with a finite score among "
            f"{slide.num_patches}, wanted at least one; the features hold NaN or infinities"
        )
    num_nonfinite = int((~torch.isfinite(scores)).sum())
    return Selection.of(slide, *kept, all_scores=scores, num_nonfinite=num_nonfinite, **counts)
