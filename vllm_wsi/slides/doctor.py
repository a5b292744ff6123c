"""What is in a feature file, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError

from .encoder_names import EncoderCheck, recorded_encoder
from .feature_file import FeatureFile
from .formats.dispatch import open_features
from .places import origin, patch_size
from .units import positive_number

CHUNK_ROWS = 4096


UNITS = {"px": "level-0 pixels", "um": "microns"}


def _in_words(value: Any) -> str:
    if value is None:
        return "unknown"
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)


class Checkpoint(NamedTuple):
    """What features have to fit."""

    name: str
    feature_dim: int  # d
    encoder: EncoderCheck


@dataclass
class Report:
    """Facts and findings of one file; `error` where it cannot be used at all."""

    path: str
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def text(self) -> str:
        lines = [self.path]
        if self.error:
            lines.append(f"  error: {self.error}")
        lines += [f"  {name + ':':12} {_in_words(value)}" for name, value in self.facts.items()]
        lines += [f"  note: {finding}" for finding in self.findings]
        if not self.error:
            lines.append("  usable")
        return "\n".join(lines)


def examine(path: str | Path, encoder: str | None = None, checkpoint: Checkpoint | None = None) -> Report:
    """Opens the file and reads all of it once, in chunks.

    Args:
        encoder: which features, where a file holds several.
        checkpoint: that they should fit.
    """
    report = Report(str(path))
    try:
        with open_features(path, encoder) as slide:
            size = f"{slide.num_patches} patches x {slide.feature_dim}, {slide.dtype}"
            report.facts = {
                "format": slide.format,
                "features": f"{slide.key}: {size}" if slide.key else size,
                "encoder": recorded_encoder(slide.metadata) or "not recorded",
            }
            report.findings += slide.remarks
            coords = slide.read_coords()
            if coords is None:
                report.facts["coords"] = "none"
            else:
                low, high = coords.min(axis=0).tolist(), coords.max(axis=0).tolist()
                unit = UNITS.get(slide.coord_unit or "", "of an unknown unit")
                report.facts["coords"] = f"x {low[0]} .. {high[0]}, y {low[1]} .. {high[1]} ({unit})"
                _report_places(slide, coords, report)
                if len(np.unique(coords, axis=0)) < len(coords):
                    report.findings.append("coords: some patches share one place")
            others = {k: v for k, v in slide.metadata.items() if k != "encoder"}
            if others:
                report.facts["metadata"] = ", ".join(f"{key}={value}" for key, value in others.items())
            _read_all(slide, report)
            if checkpoint is not None:
                _report_fit(slide, checkpoint, report)
    except SlideError as error:
        report.error = str(error)
    return report


def _report_places(slide: FeatureFile, coords: NDArray, report: Report) -> None:
    """Unit, size and origin, each with who says it."""
    report.facts["coord unit"] = {"value": slide.coord_unit, "source": slide.unit_source}
    size = patch_size(slide.metadata, coords, slide.unit, slide.name)
    report.facts["patch size"] = None if size is None else size._asdict()
    report.facts["origin"] = origin(slide.name, slide.metadata, None)._asdict()
    if slide.coord_unit == "um" and positive_number(slide.metadata.get("mpp")) is None:
        report.findings.append("coords: microns without mpp cannot be placed on the slide's pixels")
    if size is None:
        report.findings.append("patch size: nothing says it; it must be given to place the patches")
    elif size.source == "guess":
        report.findings.append("patch size: nothing says it; taken from the spacing of the grid: a guess")


def _report_fit(slide: FeatureFile, checkpoint: Checkpoint, report: Report) -> None:
    """Raises SlideError where the checkpoint cannot take the features."""
    if slide.feature_dim != checkpoint.feature_dim:
        where = f"{slide.name}: {slide.key or 'features'}: found"
        raise SlideError(f"{where} d = {slide.feature_dim}, wanted {checkpoint.feature_dim}, as the checkpoint has it")
    match = checkpoint.encoder(slide.name, slide.metadata)
    report.facts["checkpoint"] = f"{checkpoint.name}, encoder {match.checkpoint or 'not recorded'} ({match.match})"
    if match.remark is not None:
        report.findings.append(f"encoder: {match.remark}")


def _read_all(slide: FeatureFile, report: Report) -> None:
    nonfinite = zero = 0
    norms = 0.0
    for start in range(0, slide.num_patches, CHUNK_ROWS):
        rows = slide.read_rows(start, min(start + CHUNK_ROWS, slide.num_patches))
        if slide.dtype == "bfloat16":
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        values = rows.astype(np.float64)
        finite = np.isfinite(values).all(axis=1)
        length = np.sqrt((values[finite] ** 2).sum(axis=1))
        nonfinite += int((~finite).sum())
        zero += int((length == 0).sum())
        norms += float(length.sum())
    usable = slide.num_patches - nonfinite
    if usable:
        report.facts["mean norm"] = f"{norms / usable:.3g}"
    if nonfinite:
        report.findings.append(f"{nonfinite} patches hold NaN or infinities: they are never kept")
    if usable == 0:
        report.error = f"{slide.name}: {slide.key or 'features'}: found no finite patch, wanted at least one"
    if zero:
        report.findings.append(f"{zero} patches are all zero")
