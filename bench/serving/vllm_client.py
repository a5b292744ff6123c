"""Runs vLLM's own benchmark client, `vllm bench serve`, in this process: its import costs seconds and is paid once."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser

from bench.serving.workload import Asked
from vllm_wsi.serving.server_process import VllmServer


@dataclass
class Measured:
    """Requests that were answered, pooled over the rounds of one case. Seconds."""

    requests: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    to_first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        for name in ("requests", "output_tokens", "seconds", "to_first_token", "between_tokens", "prompt_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def latencies(self) -> dict[str, float]:
        """p50, p90, p99 of both, in ms."""
        parts = {"ttft": self.to_first_token, "itl": self.between_tokens}
        return {f"{name}_p{p}_ms": _percentile(values, p) * 1e3 for name, values in parts.items() for p in (50, 90, 99)}


def _percentile(values: Iterable[float], p: int) -> float:
    return float(np.percentile([*values] or [np.nan], p))


def run_load(server: VllmServer, asked: Asked, concurrency: int, output_tokens: int) -> Measured:
    """`vllm bench serve` with a `custom_image` data set, all requests at once but for `--max-concurrency`.

    Raises:
        SystemExit: a request failed.
    """
    command = f"""
        --backend openai-chat --endpoint /v1/chat/completions --base-url {server.root} --model {server.model}
        --dataset-name custom_image --dataset-path {asked.path} --disable-shuffle --no-oversample
        --num-prompts {asked.requests} --custom-output-len {output_tokens} --ignore-eos --temperature 0
        --max-concurrency {concurrency} --ready-check-timeout-sec 0 --disable-tqdm --save-detailed
        --percentile-metrics ttft,itl"""
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    logging.getLogger("vllm").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        found = asyncio.run(main_async(parser.parse_args(command.split())))
    if found["completed"] != asked.requests:
        errors = {error for error in found["errors"] if error}
        raise SystemExit(f"{found['completed']} of {asked.requests} requests were answered: {errors}\n{out.getvalue()}")
    return Measured(
        requests=found["completed"],
        output_tokens=found["total_output_tokens"],
        seconds=found["duration"],
        to_first_token=found["ttfts"],
        between_tokens=[gap for gaps in found["itls"] for gap in gaps],
        prompt_tokens=found["input_lens"],
    )
