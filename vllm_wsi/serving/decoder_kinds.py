"""Which of vLLM's decoders can stand behind slides: those whose whole memory of a prompt is attention's."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import has_inner_state, is_attention_free, is_hybrid

from vllm_wsi.errors import SettingsError
from vllm_wsi.model.config import SparseWSIConfig


def check_decoder(vllm_config: VllmConfig, config: SparseWSIConfig) -> None:
    """Refuses, when the engine starts, a decoder or an option that would not work.

    vLLM lays out the cache of a model by what its outer class says. A decoder with a state of its own (Mamba, linear
    attention) would need that the class of slide models says so too.

    Raises:
        SettingsError: the decoder keeps a state beside attention, or experts are to be balanced.
    """
    architectures = config.text_config.architectures or []
    decoder, name = vllm_config.model_config.registry.resolve_model_cls(architectures, vllm_config.model_config)
    if is_hybrid(decoder) or has_inner_state(decoder) or is_attention_free(decoder):
        raise SettingsError(
            f"decoder: found {name}, which keeps a state beside attention, wanted one of attention alone"
        )
    if vllm_config.parallel_config.enable_eplb:
        raise SettingsError("--enable-eplb: found it, wanted none: experts of a slide model's decoder are not balanced")
