"""SlideSelector: streams a feature file through the scorer and keeps the best K patches."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from vllm_wsi.errors import SettingsError, SetupError, SlideError
from vllm_wsi.kernels import ScoredTopK, ScorerWeights, block_rows, map_blocks, score_topk, select_topk
from vllm_wsi.kernels.reference import apply_scorer
from vllm_wsi.slides import FeatureFile
from vllm_wsi.slides.encoder_names import EncoderCheck, EncoderMatch

from .chunk_reader import ChunkStager, read_tensor_rows
from .scorer import ContextScorer, PatchScorer
from .selection import Selection

FrozenScorer: TypeAlias = ScorerWeights | ContextScorer
"""A scorer without gradients, as a selector runs it."""


def frozen_scorer(scorer: PatchScorer | ContextScorer) -> FrozenScorer:
    """A scorer's present weights, which later training does not change."""
    if isinstance(scorer, PatchScorer):
        return scorer.weights().map(lambda one: one.detach().clone())
    return copy.deepcopy(scorer).float().eval().requires_grad_(False)


class SlideSelector:
    """Hard Top-K over a whole slide, chunk by chunk (SparseLearn, inference path).

    Deterministic: the same file and weights give the same bits on every run and for every chunk size. Peak memory
    is two chunks and the scorer's, and 8 to 16 bytes a patch while coordinates are looked up; a `ContextScorer` keeps
    the slide's tokens too. One selector serves many threads.

    Args:
        scorer: per patch by its weights, or over the whole slide.
        num_slide_tokens: K.
        device: "cpu", "cuda", or "auto" for a GPU where there is one; CUDA starts at the first slide.
        max_patches: longer slides are refused.
        chunk_rows: rows read at once; None: `ChunkStager` decides by their size.
        encoder: whose features the scorer was trained on, and whether others are refused; None: not known.

    Raises:
        SettingsError: an unknown device.
        SetupError: "cuda" where there is none.
    """

    def __init__(
        self,
        scorer: FrozenScorer,
        num_slide_tokens: int,
        device: str = "cpu",
        max_patches: int | None = None,
        chunk_rows: int | None = None,
        encoder: EncoderCheck | None = None,
    ) -> None:
        if device not in ("cpu", "cuda", "auto"):
            raise SettingsError(f"device: found {device!r}, wanted 'cpu', 'cuda' or 'auto'")
        if device == "cuda" and not _has_cuda():
            raise SetupError("device: found 'cuda', wanted 'cpu' or 'auto': PyTorch finds no CUDA device here")
        self.num_slide_tokens = num_slide_tokens
        self.feature_dim = scorer.feature_dim
        self._scorer, self.device_name = scorer, device
        self._device: torch.device | None = None
        self.max_patches, self._chunk_rows = max_patches, chunk_rows
        self.encoder = encoder or EncoderCheck()

    @torch.no_grad()
    def select(self, slide: FeatureFile, k: int | None = None, keep_all_scores: bool = False) -> Selection:
        """Keeps the best k (default K) patches of an open feature file.

        Args:
            keep_all_scores: the selection also holds the scores and places of all patches (`Selection.all_scores`).

        Raises:
            SlideError: the slide's d, N or encoder does not fit, or no patch has a finite score.
        """
        k = self.num_slide_tokens if k is None else k
        encoder_match = self._check(slide)
        device, scorer = self._start_device()
        stager = ChunkStager(slide, device, self._chunk_rows)
        began = time.perf_counter()
        all_scores = torch.empty(slide.num_patches, device=device) if keep_all_scores else None
        if isinstance(scorer, ContextScorer):
            kept, num_nonfinite = _select_in_context(slide, stager, scorer, k, all_scores)
        else:
            kept, num_nonfinite = _select_in_stream(stager, scorer, k, all_scores)
        seconds = time.perf_counter() - began
        if not len(kept.indices):
            raise SlideError(
                f"{slide.name}: {slide.key or 'features'}: found no patch with a finite score among "
                f"{slide.num_patches}, wanted at least one; the features hold NaN or infinities"
            )
        return Selection.of(
            slide,
            *kept,
            all_scores=None if all_scores is None else all_scores.cpu(),
            num_nonfinite=num_nonfinite,
            encoder_match=encoder_match,
            read_seconds=stager.read_seconds,
            score_seconds=seconds - stager.read_seconds,
        )

    @torch.no_grad()
    def rescored(self, chosen: Selection) -> Selection:
        """A selection that something else made, with this scorer's scores of its patches. Left as it is where no patch
        can be scored by itself (`ContextScorer`).

        Raises:
            SlideError: a patch has no finite score.
        """
        _, scorer = self._start_device()
        if isinstance(scorer, ContextScorer):
            return chosen
        scores = apply_scorer(chosen.features.to(self._device), scorer).cpu()
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

    def _start_device(self) -> tuple[torch.device, FrozenScorer]:
        if self._device is None:
            name = self.device_name
            if name == "auto":
                name = "cuda" if torch.cuda.is_available() else "cpu"
            self._scorer = self._scorer.to(name)
            self._device = torch.device(name)
        return self._device, self._scorer


def _has_cuda() -> bool:
    """Without starting CUDA: PyTorch counts devices through NVML."""
    return torch.backends.cuda.is_built() and torch.cuda.device_count() > 0


class _Kept(NamedTuple):
    """On the CPU, without the places that no patch took."""

    indices: Tensor
    scores: Tensor
    features: Tensor


def _select_in_stream(
    stager: ChunkStager, weights: ScorerWeights, k: int, all_scores: Tensor | None
) -> tuple[_Kept, int]:
    """Chunk by chunk with a running Top-K; also counts the scores that are not finite."""
    running: ScoredTopK | None = None
    num_nonfinite: Tensor | int = 0
    for start, features in stager.chunks():
        with stager.on_stream():
            running = score_topk(features, weights, k, first_row=start, running=running)
            num_nonfinite = num_nonfinite + (~torch.isfinite(running.all_scores)).sum()
            if all_scores is not None:
                all_scores[start : start + len(features)] = running.all_scores
    stager.wait()
    assert running is not None
    present = running.indices[0] >= 0
    kept = (running.indices[0], running.scores[0], running.rows[0])
    return _Kept(*(x[present].cpu() for x in kept)), int(num_nonfinite)


def _select_in_context(
    slide: FeatureFile, stager: ChunkStager, scorer: ContextScorer, k: int, all_scores: Tensor | None
) -> tuple[_Kept, int]:
    """Tokens of all patches, then the blocks, then Top-K; the kept rows are read once more."""
    tokens = torch.empty(slide.num_patches, scorer.hidden_size, device=stager.device)
    rows = block_rows(max(scorer.feature_dim, scorer.hidden_size))
    for start, features in stager.chunks():
        with stager.on_stream():
            map_blocks(features, start, scorer.embed, tokens[start : start + len(features)], rows)
    with stager.on_stream():
        scores = scorer.score_tokens(tokens)
        selected = select_topk(scores, k)
        if all_scores is not None:
            all_scores.copy_(scores)
    stager.wait()
    present = selected.indices[0] >= 0
    indices, best = selected.indices[0][present].cpu(), selected.scores[0][present].cpu()
    return _Kept(indices, best, read_tensor_rows(slide, indices)), int((~torch.isfinite(scores)).sum())


class BestRows(NamedTuple):
    """What `SlideSelector` keeps of a slide whose features are in memory."""

    rows: Tensor  # int64 [m], ascending; m = min(k, num_candidates), and may be 0
    num_candidates: int  # patches with a finite score


@torch.no_grad()
def best_rows(features: Tensor, scorer: FrozenScorer, k: int) -> BestRows:
    """The best k of features [n, d]."""
    if isinstance(scorer, ContextScorer):
        tokens = torch.empty(len(features), scorer.hidden_size, device=features.device)
        map_blocks(features, 0, scorer.embed, tokens, block_rows(max(scorer.feature_dim, scorer.hidden_size)))
        scores = scorer.score_tokens(tokens)
        indices = select_topk(scores, k).indices[0]
    else:
        selected = score_topk(features, scorer, k)
        scores, indices = selected.all_scores, selected.indices[0]
    return BestRows(indices[indices >= 0], int(torch.isfinite(scores).sum()))
