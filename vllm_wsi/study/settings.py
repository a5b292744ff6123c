"""What a study is asked to do: the options of `vllm-wsi study`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from vllm_wsi.settings import Settings
from vllm_wsi.slides.encoder_names import Mismatch


class StudySettings(Settings, frozen=True):
    """See `vllm-wsi study --help`."""

    out: Path
    checkpoint: str | None = None  # None: the demo checkpoint
    questions: Path | None = None  # None: haystack's test split
    features: Path | None = None
    slides: str  # of haystack, as "1000:192,100000:24" (N:questions)
    haystack_knobs: str | None = None  # as `slides`: haystack made harder, one knob at a time
    ablations: str | None = None  # the recipe of whose last stage every arm is trained
    seeds: int = Field(5, ge=1)
    ablation_slides: str  # as `slides`
    seed: int = 0
    encoder_mismatch: Mismatch = "refuse"
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _one_source(self) -> StudySettings:
        if self.questions is not None and self.features is None:
            raise ValueError("--questions: found no --features beside it, wanted the directory of feature files")
        return self

    def record(self) -> dict[str, str]:
        """What `study.json` says was asked; where it was written says nothing."""
        return {name: str(value) for name, value in self if value is not None and name != "out"}
