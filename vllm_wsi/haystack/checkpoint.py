"""The trained demo checkpoint in this package."""

from __future__ import annotations

from pathlib import Path

DEMO_CHECKPOINT = Path(__file__).with_name("demo_checkpoint")
"""Made by `vllm-wsi train haystack --out DIR` (seed 0).

It can answer questions about haystack's virtual slides only.
"""
