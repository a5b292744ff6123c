"""How the tissue checkpoint is made, and what of it is in this package."""

from __future__ import annotations

from pathlib import Path

TISSUE_RECIPES = {name: Path(__file__).with_name(f"{name}.yaml") for name in ("tissue", "kather")}
"""The recipes of `vllm-wsi train tissue --tissue-dir DIR --fold F --out RUN` (fold 0 made the checkpoint) and of
`vllm-wsi train kather --tissue-dir DIR --leave-out SLIDE --out RUN`."""

CALIBRATE_TISSUE = Path(__file__).with_name("calibrate_tissue.yaml")
"""What the tissue checkpoint's calibration is fitted to."""

TISSUE_PARTS = Path(__file__).with_name("checkpoint")
"""Scorer, projector and LoRA of the tissue checkpoint, over SmolLM2-135M-Instruct (`model/trained_parts.py`)."""
