"""The command `vllm-wsi`."""
