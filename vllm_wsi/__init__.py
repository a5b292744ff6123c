"""vllm-wsi: whole-slide-image language models on vLLM. Importing it costs nothing: no torch, no vLLM."""

__version__ = "0.1.0"


def register() -> None:
    """vLLM calls this in each of its processes (entry point `vllm.general_plugins`); repeated calls do nothing new."""
    from vllm_wsi.serving.plugin import register_with_vllm

    register_with_vllm()
