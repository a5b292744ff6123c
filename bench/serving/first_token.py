"""Time to the first token of a real `vllm serve`, over HTTP: `python -m bench.serving.first_token [--quick]`.

One server for each d, with a small decoder (2 layers, random weights): what is measured is what slides add to a
request, not the decoder. The cases of one N alternate within every round, so that all meet the same noise:

- new: a slide that the server has never seen: each round makes a hard link, whose path, and so whose identity, is
  new while the file's pages stay warm; the server reads, scores and selects, then prefills. The server's own counter
  has to say that one selection was made.
- repeated: another question, of equal length, about the slide of the same round. The slide stands before the
  question, as users put it, so that vLLM's prefix cache may hold the slide's tokens too, where they fill a whole
  block (vLLM's default on the CPU is 128 tokens: with K = 32 they do not). The selection comes from the cache.
- embeds: the same features by value, as vLLM's own `image_embeds`, in the first rounds alone (the body of 100,000 x
  512 has 137 MB). From the warm-up on their selection is known by their content: what is left is moving them.
- text: no slide, and padded to the same number of prompt tokens (usage.prompt_tokens is compared).

Every text begins with another number, so that prefix caching shortens no request by more than the chat template's
first tokens and, in the repeated case, the slide's. Each request asks for one token and is not streamed: its time
is the time to the first token as a client sees it.

Two ratios of medians: repeated / text, aimed at 1.1 at most, and new / (selection alone + text), at 1.3, where the
selection alone is what the server's own counters of reading and scoring seconds grew by.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from openai import OpenAI

from bench.common.record import RESULTS, append_row, check_header
from bench.serving.workload import sync_and_read
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.slides import open_features
from vllm_wsi.slides.synthetic import write_synthetic_slide

CSV = RESULTS / "first_token.csv"
CASES = ("new", "repeated", "text", "selection", "embeds")
COLUMNS = (
    "num_patches", "feature_dim", "dtype", "k", "prompt_tokens", "rounds",
    *(f"{case}_{what}_ms" for case in CASES for what in ("median", "p90")),
    "repeated_over_text", "new_over_parts", "embeds_over_repeated",
)  # fmt: skip
NUM_PATCHES, FEATURE_DIMS, DTYPE, K = (1_000, 10_000, 100_000), (512, 1536), "float16", 32
ROUNDS, QUICK_ROUNDS, WARM_UP_ROUNDS, EMBEDS_ROUNDS = 20, 5, 2, 5
SERVER_ARGS = (
    "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8", "--enable-mm-embeds",
)  # fmt: skip
QUESTION = " Is there tumour in this slide, of which grade, and which of its regions show it best? Answer briefly."


class Bench:
    """The requests of one server. Every text is unique from its first characters on."""

    def __init__(self, server: VllmServer) -> None:
        self._server = server
        self._client = OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=300)
        self._numbers = itertools.count()

    def text(self) -> tuple[float, int]:
        # The byte tokenizer makes one token of each character: K of them stand for the slide's tokens.
        return self._ask([{"type": "text", "text": self._question() + "." * K}])

    def slide(self, path: Path) -> tuple[float, int]:
        return self.url(path.as_uri())

    def url(self, url: str) -> tuple[float, int]:
        image = {"type": "image_url", "image_url": {"url": url}}
        return self._ask([image, {"type": "text", "text": self._question()}])

    def embeds(self, encoded: str) -> tuple[float, int]:
        return self._ask(
            [{"type": "image_embeds", "image_embeds": encoded}, {"type": "text", "text": self._question()}]
        )

    def counter(self, name: str) -> float:
        return self._server.metrics().get(f"vllm_wsi:{name}_total", 0.0)

    def selection_seconds(self) -> float:
        metrics = self._server.metrics()
        return sum(metrics.get(f"vllm_wsi:{name}_seconds_sum", 0.0) for name in ("read", "score"))

    def _question(self) -> str:
        return f"{next(self._numbers):06d}{QUESTION}"

    def _ask(self, parts: list[dict]) -> tuple[float, int]:
        """(ms, prompt tokens) of a request for one token."""
        began = time.perf_counter()
        answer = self._client.chat.completions.create(
            model=self._server.model, messages=[{"role": "user", "content": parts}], max_tokens=1, temperature=0
        )
        return (time.perf_counter() - began) * 1e3, answer.usage.prompt_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first token of a real vllm serve.")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds")
    parser.add_argument("--feature-dims", type=int, nargs="+", default=FEATURE_DIMS, metavar="D")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    sizes, dims = (NUM_PATCHES[:2], args.feature_dims[:1]) if args.quick else (NUM_PATCHES, args.feature_dims)
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    print(f"median / p90 in ms over {rounds} rounds; aims: rep/text at most 1.1, new/parts 1.3")
    heads = ("new slide", "repeated", "text only", "selection", "image_embeds")
    ratios = f"{'rep/text':>10}{'new/parts':>11}{'embeds/rep':>12}"
    print(f"{'N':>9}{'d':>6}" + "".join(f"{head:>18}" for head in heads) + ratios)
    for feature_dim in dims:
        for row in bench_server(feature_dim, sizes, rounds):
            append_row(args.csv, row)
            times = "".join(f"{row[f'{case}_median_ms']:10.1f} / {row[f'{case}_p90_ms']:5.0f}" for case in CASES)
            ratios = (
                f"{row['repeated_over_text']:10.2f}{row['new_over_parts']:11.2f}{row['embeds_over_repeated']:12.2f}"
            )
            print(f"{row['num_patches']:9,}{feature_dim:6}{times}{ratios}", flush=True)


def bench_server(feature_dim: int, sizes: tuple[int, ...], rounds: int) -> list[dict]:
    """The rows of one d, all sizes in turn within each round."""
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-bench-") as folder:
        work = Path(folder)
        slides = {n: work / f"{n}.safetensors" for n in sizes}
        for n, path in slides.items():
            write_synthetic_slide(path, n, feature_dim, dtype=DTYPE)
            sync_and_read(path)
        encoded = {n: as_embeds(path) for n, path in slides.items()}
        init_checkpoint(
            work / "checkpoint",
            TinySettings(feature_dim=feature_dim, max_position_embeddings=131072, num_slide_tokens=K),
        )
        times: dict[int, dict[str, list[float]]] = {n: {case: [] for case in CASES} for n in sizes}
        tokens: set[int] = set()
        with VllmServer(work / "checkpoint", work, work / "server.log", SERVER_ARGS) as server:
            bench = Bench(server)
            for number in range(WARM_UP_ROUNDS + rounds):
                for n in random.sample(sizes, len(sizes)):
                    value = encoded[n] if number < WARM_UP_ROUNDS + EMBEDS_ROUNDS else None
                    one, counts = one_round(bench, slides[n], work / f"round-{number}-{n}.safetensors", value)
                    tokens |= counts
                    if number >= WARM_UP_ROUNDS:
                        for case, ms in one.items():
                            times[n][case].append(ms)
    if len(tokens) != 1:
        raise SystemExit(f"prompts: found {sorted(tokens)} tokens, wanted one number for all cases")
    return [row_of(n, feature_dim, tokens.copy().pop(), rounds, times[n]) for n in sizes]


def as_embeds(path: Path) -> str:
    """A slide's features as a client sends them in `image_embeds`: torch.save, then base64."""
    with open_features(path) as slide:
        rows = torch.from_numpy(slide.read_rows(0, slide.num_patches))
    buffer = io.BytesIO()
    torch.save(rows, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def one_round(bench: Bench, original: Path, slide: Path, encoded: str | None) -> tuple[dict[str, float], set[int]]:
    """(ms of each case, prompt tokens of each case) for one fresh link to a slide."""
    os.link(original, slide)
    steps = ["new", "repeated"]
    steps.insert(random.randrange(3), "text")
    times, tokens = {}, set()
    selections, selected = bench.counter("selections"), bench.selection_seconds()
    for step in steps:
        times[step], count = bench.text() if step == "text" else bench.slide(slide)
        tokens.add(count)
    times["selection"] = (bench.selection_seconds() - selected) * 1e3
    if (made := bench.counter("selections") - selections) != 1:
        raise SystemExit(f"{slide.name}: found {made:.0f} selections in one round, wanted 1, for the new slide alone")
    if encoded is not None:
        times["embeds"], count = bench.embeds(encoded)
        tokens.add(count)
    slide.unlink()
    return times, tokens


def row_of(num_patches: int, feature_dim: int, tokens: int, rounds: int, times: dict[str, list[float]]) -> dict:
    medians = {case: float(np.median(values)) for case, values in times.items()}
    values = (
        num_patches, feature_dim, DTYPE, K, tokens, rounds,
        *(round(x, 2) for case in CASES for x in (medians[case], float(np.percentile(times[case], 90)))),
        round(medians["repeated"] / medians["text"], 3),
        round(medians["new"] / (medians["selection"] + medians["text"]), 3),
        round(medians["embeds"] / medians["repeated"], 3),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


if __name__ == "__main__":
    main()
