"""What the plugin adds to a vLLM process: the model, by name alone, and the flag `--plugin`."""

from __future__ import annotations

from vllm import ModelRegistry

from vllm_wsi.model.config import ARCHITECTURE

from . import vllm_hooks


def register_with_vllm() -> None:
    """Idempotent; importing `vllm_wsi.model.config` makes the model type known to transformers."""
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"vllm_wsi.serving.model:{ARCHITECTURE}")
    vllm_hooks.install("every process")
