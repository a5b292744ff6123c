"""SlideSelector: streams a feature file through the scorer and keeps the best K patches."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_wsi.errors import SettingsError, SetupError, SlideError
from vllm_wsi.kernels import ScoredTopK, ScorerWeights, block_rows, map_blocks, score_topk, select_topk
from vllm_wsi.slides import FeatureFile
from vllm_wsi.slides.encoder_names import EncoderCheck, EncoderMatch
from vllm_wsi.slides.feature_file import CoordUnit, Source
from vllm_wsi.slides.places import PatchSize, Said, guesses, patch_size, settle
from vllm_wsi.slides.regions import Level0Rects, level0_rects
from vllm_wsi.slides.units import Unit

from .chunk_reader import ChunkStager, read_tensor_rows
from .scorer import ContextScorer, PatchScorer

FrozenScorer: TypeAlias = ScorerWeights | ContextScorer
"""A scorer without gradients, as a selector runs it."""


def frozen_scorer(scorer: PatchScorer | ContextScorer) -> FrozenScorer:
    """A scorer's present weights, which later training does not change."""
    if isinstance(scorer, PatchScorer):
        return scorer.weights().map(lambda one: one.detach().clone())
    return copy.deepcopy(scorer).float().eval().requires_grad_(False)


NOTHING_SAID = Said()


@dataclass(frozen=True)
class Selection:
    """The patches of one slide that the decoder sees, in ascending order of their rows. On the CPU."""

    indices: Tensor  # int64 [k], k = min(K, patches with a finite score)
    scores: Tensor  # fp32 [k]
    features: Tensor  # [k, d], the file's dtype
    num_patches: int  # N
    num_nonfinite: int  # patches whose score was NaN or infinite: never kept
    read_seconds: float = 0.0
    score_seconds: float = 0.0  # upload, scoring and Top-K, less what ran while the next chunk was read
    coords: NDArray | None = None  # [k, 2] top-left corners in coord_unit
    coord_unit: CoordUnit | None = None  # None: there are no places, or nothing tells their unit
    unit_source: Source | None = None
    patch_size: PatchSize | None = None  # edge of a patch; None: not known
    metadata: Mapping[str, str] = field(default_factory=dict)  # the file's own
    all_scores: Tensor | None = None  # fp32 [N] of all patches, the dropped ones too; where it was asked for
    all_coords: NDArray | None = None  # [N, 2], beside `all_scores`
    encoder_match: EncoderMatch | None = None  # with the checkpoint's encoder; None: no checkpoint selected

    @classmethod
    def of(
        cls,
        slide: FeatureFile,
        indices: Tensor,
        scores: Tensor,
        features: Tensor,
        all_scores: Tensor | None = None,
        **counts: Any,
    ) -> Selection:
        """A selection with what the slide's file says of the kept patches; `counts`: num_nonfinite, the seconds,
        encoder_match."""
        coords, unit = slide.read_coords(), slide.coord_unit
        return cls(
            indices=indices,
            scores=scores,
            features=features,
            num_patches=slide.num_patches,
            coords=None if coords is None else coords[indices.numpy()],
            coord_unit=unit,
            unit_source=slide.unit_source,
            patch_size=None if coords is None else patch_size(slide.metadata, coords, unit, slide.name),
            metadata=slide.metadata,
            all_scores=all_scores,
            all_coords=None if all_scores is None else coords,
            **counts,
        )

    def settle(self, name: str, said: Said = NOTHING_SAID) -> tuple[Unit | None, PatchSize | None]:
        """Unit of the coordinates and size of a patch, by the file and the user together. Raises SlideError."""
        return settle(name, self.coord_unit, self.unit_source, self.patch_size, said)

    def guesses(self, name: str, said: Said = NOTHING_SAID) -> list[str]:
        """What of the patches' places is only guessed, in words; [] where nothing is, or the user accepts it."""
        return [] if said.accept_guess or self.coords is None else guesses(*self.settle(name, said))

    def rects(self, name: str, said: Said = NOTHING_SAID) -> Level0Rects:
        """Level-0 rectangles of the kept patches, in their order.

        Args:
            name: names the slide in errors.
            said: by the user; mpp is needed where the file speaks of microns and says none.

        Raises:
            SlideError: neither says where the patches lie, or how large they are, or they contradict each other.
        """
        return self._rects(name, self.coords, said)

    def all_rects(self, name: str, said: Said = NOTHING_SAID) -> Level0Rects:
        """The same of all N patches; for a selection that was asked to keep them."""
        assert self.all_scores is not None
        return self._rects(name, self.all_coords, said)

    def _rects(self, name: str, coords: NDArray | None, said: Said) -> Level0Rects:
        unit, size = self.settle(name, said)
        return level0_rects(name, coords, None if unit is None else unit.unit, size, self.metadata, said.mpp)

    def record(self, name: str = "slide", said: Said = NOTHING_SAID) -> dict[str, Any]:
        """The selection as plain JSON values; unit and size each with their source, the user's word among them.

        Raises:
            SlideError: the file contradicts the user.
        """
        unit, size = self.settle(name, said)
        return {
            "num_patches": self.num_patches,
            "num_selected": len(self.indices),
            "num_nonfinite": self.num_nonfinite,
            "indices": self.indices.tolist(),
            "scores": self.scores.tolist(),
            "coords": None if self.coords is None else self.coords.tolist(),
            "coord_unit": None if unit is None or self.coords is None else unit.unit,
            "coord_unit_source": None if unit is None or self.coords is None else unit.source,
            "patch_size": None if size is None else size._asdict(),
            "metadata": dict(self.metadata),
            "encoder_match": None if self.encoder_match is None else self.encoder_match._asdict(),
        }


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


@torch.no_grad()
def best_rows(features: Tensor, scorer: FrozenScorer, k: int) -> Tensor:
    """int64 [m], ascending: the rows that `SlideSelector` keeps of a slide whose features [n, d] are in memory.

    m = min(k, patches with a finite score), and may be 0.
    """
    if isinstance(scorer, ContextScorer):
        tokens = torch.empty(len(features), scorer.hidden_size, device=features.device)
        map_blocks(features, 0, scorer.embed, tokens, block_rows(max(scorer.feature_dim, scorer.hidden_size)))
        indices = select_topk(scorer.score_tokens(tokens), k).indices[0]
    else:
        indices = score_topk(features, scorer, k).indices[0]
    return indices[indices >= 0]
