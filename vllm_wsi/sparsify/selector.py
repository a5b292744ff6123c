"""SlideSelector: streams a feature file through the scorer and keeps the best K patches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_wsi.kernels import ScoredTopK, ScorerWeights, score_topk
from vllm_wsi.slides import FeatureFile, SlideError
from vllm_wsi.slides.features import CoordUnit

from .staging import ChunkStager


@dataclass(frozen=True)
class Selection:
    """The patches of one slide that the decoder sees, in ascending order of their rows. On the CPU."""

    indices: Tensor  # int64 [k], k = min(K, patches with a finite score)
    scores: Tensor  # fp32 [k]
    features: Tensor  # [k, d], the file's dtype
    num_patches: int  # N
    num_nonfinite: int  # patches whose score was NaN or infinite: never kept
    read_seconds: float = 0.0
    score_seconds: float = 0.0  # upload, scoring and Top-K, as far as reading did not hide them
    coords: NDArray | None = None  # [k, 2] top-left corners in coord_unit
    coord_unit: CoordUnit | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  # the file's own

    def record(self) -> dict[str, Any]:
        """The evidence as plain JSON values."""
        return {
            "num_patches": self.num_patches,
            "num_kept": len(self.indices),
            "num_nonfinite": self.num_nonfinite,
            "indices": self.indices.tolist(),
            "scores": self.scores.tolist(),
            "coords": None if self.coords is None else self.coords.tolist(),
            "coord_unit": self.coord_unit,
            "metadata": dict(self.metadata),
        }


class SlideSelector:
    """Hard Top-K over a whole slide, chunk by chunk (SparseLearn, inference path).

    Deterministic: the same file and weights give the same bits on every run and for every chunk size. Peak memory
    is two chunks and the scorer's, and 8 to 16 bytes a patch while coordinates are looked up. One selector serves
    many threads.

    Args:
        weights: of the scorer.
        num_slide_tokens: K.
        device: "cpu", "cuda", or "auto" for a GPU where there is one; CUDA starts at the first slide.
        max_patches: longer slides are refused.
        chunk_rows: rows read at once; None: `staging.py` decides by their size.
    """

    def __init__(
        self,
        weights: ScorerWeights,
        num_slide_tokens: int,
        device: str = "cpu",
        max_patches: int | None = None,
        chunk_rows: int | None = None,
    ) -> None:
        if device not in ("cpu", "cuda", "auto"):
            raise ValueError(f"device: found {device!r}, wanted 'cpu', 'cuda' or 'auto'")
        self.num_slide_tokens = num_slide_tokens
        self.feature_dim = weights.feature_dim
        self._weights, self.device_name = weights, device
        self._device: torch.device | None = None
        self.max_patches, self._chunk_rows = max_patches, chunk_rows

    @torch.no_grad()
    def select(self, slide: FeatureFile, k: int | None = None) -> Selection:
        """Keeps the best k (default K) patches of an open feature file.

        Raises:
            SlideError: the slide's d or N does not fit, or no patch has a finite score.
        """
        k = self.num_slide_tokens if k is None else k
        self._check(slide)
        device, weights = self._start_device()
        stager = ChunkStager(slide, device, self._chunk_rows)
        running: ScoredTopK | None = None
        num_nonfinite: Tensor | int = 0
        began = time.perf_counter()
        for start, features in stager.chunks():
            with stager.on_stream():
                running = score_topk(features, weights, k, first_row=start, running=running)
                num_nonfinite = num_nonfinite + (~torch.isfinite(running.all_scores)).sum()
        stager.wait()
        seconds = time.perf_counter() - began
        assert running is not None
        present = running.indices[0] >= 0
        if not present.any():
            raise SlideError(
                f"{slide.name}: {slide.key or 'features'}: found no patch with a finite score among "
                f"{slide.num_patches}, wanted at least one; the features hold NaN or infinities"
            )
        indices, coords = running.indices[0][present].cpu(), slide.read_coords()
        return Selection(
            indices=indices,
            scores=running.scores[0][present].cpu(),
            features=running.rows[0][present].cpu(),
            num_patches=slide.num_patches,
            num_nonfinite=int(num_nonfinite),
            read_seconds=stager.read_seconds,
            score_seconds=seconds - stager.read_seconds,
            coords=None if coords is None else coords[indices.numpy()],
            coord_unit=slide.coord_unit,
            metadata=slide.metadata,
        )

    def _check(self, slide: FeatureFile) -> None:
        where = f"{slide.name}: {slide.key or 'features'}: found"
        if slide.feature_dim != self.feature_dim:
            raise SlideError(f"{where} d = {slide.feature_dim}, wanted {self.feature_dim}, as the checkpoint has it")
        if self.max_patches is not None and slide.num_patches > self.max_patches:
            raise SlideError(f"{where} {slide.num_patches} patches, wanted at most {self.max_patches} (max_patches)")

    def _start_device(self) -> tuple[torch.device, ScorerWeights]:
        if self._device is None:
            name = self.device_name
            if name == "auto":
                name = "cuda" if torch.cuda.is_available() else "cpu"
            self._weights = self._weights.to(name)
            self._device = torch.device(name)
        return self._device, self._weights
