"""How the tissue checkpoint is made, and what of it is in this package."""

from __future__ import annotations

from pathlib import Path

TISSUE_RECIPE = Path(__file__).with_name("tissue.yaml")
"""The recipe of `vllm-wsi train tissue --tissue-dir DIR --fold F --out RUN`; fold 0 made the checkpoint."""

TISSUE_PARTS = Path(__file__).with_name("checkpoint")
"""Scorer, projector and LoRA of the tissue checkpoint, over SmolLM2-135M-Instruct (`model/trained_parts.py`)."""
