"""A vLLM plugin of the benchmark's own: counts what an API server sends to the engine, for /metrics."""

from __future__ import annotations

from prometheus_client import REGISTRY, Counter

NAME = "vllm_wsi_bench:bytes_to_engine"


def register() -> None:
    """vLLM calls it in every process, at times twice; of the engine's own counts nobody asks."""
    from vllm.v1.serial_utils import MsgpackEncoder

    if NAME in REGISTRY._names_to_collectors:
        return
    sent = Counter(NAME, "Bytes of encoded requests, tensors included.")
    encode = MsgpackEncoder.encode

    def counting(self, obj):
        parts = encode(self, obj)
        sent.inc(sum(memoryview(part).nbytes for part in parts))
        return parts

    MsgpackEncoder.encode = counting
