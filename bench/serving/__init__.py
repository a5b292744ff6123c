"""A real `vllm serve` under load: requests a second, time to the first token."""
