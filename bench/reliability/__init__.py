"""A real `vllm serve` over many requests, and beside slides that are slow."""
