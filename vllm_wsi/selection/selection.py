"""Selection: the kept patches of one slide, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_wsi.errors import SlideError
from vllm_wsi.slides import FeatureFile
from vllm_wsi.slides.encoder_names import EncoderMatch
from vllm_wsi.slides.feature_file import Unit
from vllm_wsi.slides.places import PatchSize, Said, guesses, patch_size, settle
from vllm_wsi.slides.regions import Level0Rects, level0_rects

from .score_summary import ScoreSummary
from .slide_pools import SlidePools

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
    coords: NDArray | None = None  # [k, 2] top-left corners, the file's own numbers
    unit: Unit | None = None  # of them; None: there are no places, or nothing tells their unit
    patch_size: PatchSize | None = None  # edge of a patch; None: not known
    metadata: Mapping[str, str] = field(default_factory=dict)  # the file's own
    all_scores: Tensor | None = None  # fp32 [N] of all patches, the dropped ones too; where it was asked for
    all_coords: NDArray | None = None  # [N, 2], beside `all_scores`
    pools: SlidePools | None = None  # of all patches, beside `all_scores`, where there are summary tokens
    pooled: Tensor | None = None  # fp32 [s, d], means of the dropped patches; None: there are no summary tokens
    encoder_match: EncoderMatch | None = None  # with the checkpoint's encoder; None: no checkpoint selected
    scored_on: str = "cpu"  # or the name of a GPU, its architecture and versions
    summary: ScoreSummary | None = None  # of all scores; None: they are not a scorer's
    fallback: str | None = None  # why the CPU scored what a GPU should have; None: no such thing

    @property
    def num_tokens(self) -> int:
        """Slide tokens of the decoder: one for each kept patch, and behind them the summary tokens."""
        return len(self.indices) + self.num_summary_tokens

    @property
    def num_summary_tokens(self) -> int:
        return 0 if self.pooled is None else len(self.pooled)

    @property
    def rows(self) -> Tensor:
        """[num_tokens, d] that the projector reads: of the kept patches, in the file's dtype where there are no others,
        and of the summary tokens."""
        return self.features if self.pooled is None else torch.cat((self.features.float(), self.pooled))

    @property
    def num_candidates(self) -> int:
        """Patches with a finite score, which the kept ones were chosen from."""
        return self.num_patches - self.num_nonfinite

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
        encoder_match, scored_on."""
        coords, unit = slide.read_stored_coords(), slide.unit
        placed = _in_unit(unit, coords)
        return cls(
            indices=indices,
            scores=scores,
            features=features,
            num_patches=slide.num_patches,
            coords=None if coords is None else coords[indices.numpy()],
            unit=unit,
            patch_size=None if placed is None else patch_size(slide.metadata, placed, unit, slide.name),
            metadata=slide.metadata,
            all_scores=all_scores,
            all_coords=None if all_scores is None else coords,
            **counts,
        )

    def without_all_scores(self) -> Selection:
        """Without what is known of all patches, which is large."""
        return replace(self, all_scores=None, all_coords=None, pools=None)

    def settle(self, name: str, said: Said = NOTHING_SAID) -> tuple[Unit | None, PatchSize | None]:
        """Unit of the coordinates and size of a patch, by the file and the user together. Raises SlideError."""
        return settle(name, self.unit, self.patch_size, said)

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
        coords = _in_unit(unit, coords)
        return level0_rects(name, coords, None if unit is None else unit.unit, size, self.metadata, said.mpp)

    def record(self, name: str = "slide", said: Said = NOTHING_SAID) -> dict[str, Any]:
        """The selection as plain JSON values; unit and size each with their source, the user's word among them.

        Raises:
            SlideError: the file contradicts the user.
        """
        unit, size = self.settle(name, said)
        coords = _in_unit(unit, self.coords)
        return {
            "num_patches": self.num_patches,
            "num_selected": len(self.indices),
            "num_summary_tokens": self.num_summary_tokens,
            "num_nonfinite": self.num_nonfinite,
            "indices": self.indices.tolist(),
            "scores": self.scores.tolist(),
            "coords": None if coords is None else coords.tolist(),
            "coord_unit": None if unit is None or coords is None else unit.unit,
            "coord_unit_source": None if unit is None or coords is None else unit.source,
            "patch_size": None if size is None else size._asdict(),
            "metadata": dict(self.metadata),
            "encoder_match": None if self.encoder_match is None else self.encoder_match._asdict(),
            "scored_on": self.scored_on,
        }


def _in_unit(unit: Unit | None, coords: NDArray | None) -> NDArray | None:
    """A file's own numbers in the unit; as they are where there is none."""
    return coords if coords is None or unit is None else unit.of(coords)


def check_summary(chosen: Selection, summary_tokens: int) -> None:
    """Raises SlideError where a selection has other summary tokens than a checkpoint shows, whose S is given."""
    found = "none" if chosen.pooled is None else f"{len(chosen.pooled)} rows"
    if summary_tokens == 0 and chosen.pooled is not None:
        raise SlideError(f"Selection: pooled: found {found}, wanted none: the checkpoint has no summary tokens")
    if summary_tokens and (chosen.pooled is None or len(chosen.pooled) > summary_tokens):
        raise SlideError(
            f"Selection: pooled: found {found}, wanted the means of the dropped patches, at most {summary_tokens}, as "
            "the checkpoint's own selector gives them"
        )
