"""What a study of real tissue is asked to do: the options of `vllm-wsi study --data tissue`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from vllm_wsi.settings import Settings
from vllm_wsi.slides.encoder_names import Mismatch
from vllm_wsi.tissue.tissue_generator import ENCODER, TRAINING_VIEWS, TissueSplit
from vllm_wsi.tissue.tissue_questions import Kind

ALL, NATURAL = "all", "natural"


class TissueStudySettings(Settings, frozen=True):
    """See `vllm-wsi study --help`."""

    out: Path
    checkpoint: str
    tissue_dir: Path
    slides: str  # N:COUNT for each length
    shares: str  # of tumour
    kinds: list[Kind] = Field(min_length=1)
    encoder: str | None = None  # None: the one that the checkpoint records, else efficientnet-lite0
    num_folds: int = Field(3, ge=2)
    fold: int = Field(0, ge=0)
    num_views: int = Field(TRAINING_VIEWS, ge=1)  # of each patch: for long slides, and for the probe's training
    most_shown: int = Field(1024, ge=1)  # longest slides of which every patch is shown to the decoder
    max_new_tokens: int = Field(24, ge=1)  # of a written answer
    unseen_wording: bool = False
    cache: Path | None = None  # of features
    seed: int = 0
    encoder_mismatch: Mismatch = "refuse"
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _readable(self) -> TissueStudySettings:
        self.lengths()
        self.tumour_shares()
        return self

    def lengths(self) -> list[tuple[str, int]]:
        """(N, "all" or "natural"; slides of each share) in order."""
        found = []
        for part in self.slides.split(","):
            length, _, count = part.partition(":")
            if not ((length.isdecimal() and int(length)) or length in (ALL, NATURAL)) or not count.isdecimal():
                raise ValueError(f"--slides: found {part!r}, wanted N:COUNT, {ALL}:COUNT or {NATURAL}:COUNT")
            if not int(count):
                raise ValueError(f"--slides: found {part!r}, wanted at least one slide")
            found.append((length, int(count)))
        return found

    def tumour_shares(self) -> list[float]:
        """Shares of tumour in (0, 1], in order."""
        try:
            found = [float(part) for part in self.shares.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 < share <= 1 for share in found):
            raise ValueError(
                f"--shares: found {self.shares!r}, wanted numbers above 0 up to 1, with commas between them"
            )
        return found

    def split(self, side: Literal["train", "test"]) -> TissueSplit:
        """The patches of one side of the fold."""
        return TissueSplit(
            data=self.tissue_dir,
            encoder=self.encoder or ENCODER,
            num_views=self.num_views,
            num_folds=self.num_folds,
            fold=self.fold,
            side=side,
            cache=self.cache,
        )

    def record(self) -> dict[str, str]:
        """What `study.json` says was asked; where it was written, and where the data lay, says nothing."""
        left_out = ("out", "tissue_dir", "cache")
        return {name: str(value) for name, value in self if value is not None and name not in left_out}
