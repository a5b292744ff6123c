"""What slow slides cost the other requests: `python -m bench.reliability.slow_file [--quick]`.

A real `vllm serve` with a small random checkpoint (d = 64, K = 32) answers ordinary requests, four in flight without a
pause: questions about slides that it knows, and text alone, each with a text of its own. Measured is the time to the
first token of each, as a client of the streamed answer sees it. In every round the arms take turns, in random order:

- none: nothing but the ordinary requests.
- slow: meanwhile eight new slides stall at their opening (within the kernel, `slow_slides.py`), and four more trickle
  in over HTTP at 80 KB/s each.
- full: meanwhile sixteen new slides stall, which holds every thread of the selection, eight further new slides wait
  behind them, and four trickle.

That the slow slides were slow throughout is checked: none of their requests may be done when its arm ends, and all must
be answered once their slides go on. The aim is that slow slides delay the other requests' p99 by less than 10 %. Ratios
are of the arms' p99 over all rounds, with 95 % intervals by a bootstrap over rounds. Exit code 1 where an interval
lies wholly above the aim (`--quick` does not judge).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import openai
from numpy.typing import NDArray

from bench.common.record import RESULTS, append_row, check_header
from bench.reliability.random_slides import MAX_PATCHES, D, Slides
from bench.reliability.slow_slides import LEASE_SECONDS, StalledFiles, TrickleServer
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.serving.service import THREADS

CSV = RESULTS / "slow_file.csv"
ARMS = {"none": (0, 0, 0), "slow": (8, 0, 4), "full": (THREADS, 8, 4)}  # slides that stall, that wait, that trickle
IN_FLIGHT, MAX_TOKENS, KNOWN_SLIDES, AIM = 4, 4, 8, 1.10
ROUNDS, SECONDS, QUICK_ROUNDS, QUICK_SECONDS = 20, 5.0, 3, 2.0
BOOTSTRAPS = 2000
COLUMNS = (
    "in_flight", "rounds", "seconds_per_arm",
    *(f"{what}_{arm}" for arm in ARMS for what in ("requests", "p50_ms", "p99_ms")),
    *(f"p99_ratio_{arm}{end}" for arm in ("slow", "full") for end in ("", "_low", "_high")),
)  # fmt: skip
SERVER_ARGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "64")


class Load:
    """Requests to one server, each with a text of its own."""

    def __init__(self, server: VllmServer, slides: Slides, web: TrickleServer) -> None:
        self._model, self._slides, self._web = server.model, slides, web
        self._client = openai.AsyncOpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=300)
        self._known = [slides.new("safetensors")[0].as_uri() for _ in range(KNOWN_SLIDES)]
        self._numbers = itertools.count()

    async def first_token_ms(self, *urls: str) -> float:
        """Of one streamed answer, which is read to its end."""
        question = f"{next(self._numbers):07d} Is there tumour in this slide, and of which grade?"
        parts: list = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        messages: list = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        began, first = time.perf_counter(), None
        stream = await self._client.chat.completions.create(
            model=self._model, messages=messages, max_tokens=MAX_TOKENS, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for _ in stream:  # vLLM sends the first chunk, of the role, together with the first token
            first = first or time.perf_counter()
        if first is None:
            raise SystemExit("answer: found no token, wanted one")
        return (first - began) * 1e3

    async def ordinary(self, seconds: float) -> list[float]:
        """Times to the first token [ms] of what `IN_FLIGHT` busy clients ask in that time."""
        times: list[float] = []
        end = time.monotonic() + seconds

        async def one_client() -> None:
            while time.monotonic() < end:
                urls = [random.choice(self._known)] if random.random() < 2 / 3 else []
                times.append(await self.first_token_ms(*urls))

        await asyncio.gather(*(one_client() for _ in range(IN_FLIGHT)))
        return times

    async def arm(self, stalling: int, waiting: int, trickling: int, seconds: float) -> list[float]:
        """`ordinary`, while so many slides stall, wait behind them, and trickle.

        Raises:
            SystemExit: a slow slide was not slow for so long.
        """
        # Of a MiB each, which trickles for 13 s: longer than any arm.
        paths = [self._slides.new("safetensors", MAX_PATCHES)[0] for _ in range(stalling + waiting + trickling)]
        stalled, began = StalledFiles(paths[:stalling]), time.monotonic()
        self._web.slow.set()
        urls = [path.as_uri() for path in paths[: stalling + waiting]]
        urls += [f"{self._web.root}/{path.name}" for path in paths[stalling + waiting :]]
        try:
            slow = [asyncio.create_task(self.first_token_ms(url)) for url in urls[:stalling]]
            while stalled.waited_for() < stalling:
                await asyncio.sleep(0.01)
            slow += [asyncio.create_task(self.first_token_ms(url)) for url in urls[stalling:]]
            times = await self.ordinary(seconds)
            if done := [task for task in slow if task.done()]:
                ends = {repr(task.exception() or "an answer") for task in done}
                raise SystemExit(
                    f"slow slides: found {len(done)} of {len(slow)} done before their time ({', '.join(sorted(ends))}) "
                    f"after {time.monotonic() - began:.0f} s of {seconds:.0f}, wanted none"
                )
        finally:
            stalled.release()
            self._web.slow.clear()
        await asyncio.gather(*slow)
        for path in paths:
            path.unlink()
        return times

    async def close(self) -> None:
        await self._client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first token while slides are slow.")
    parser.add_argument("--quick", action="store_true", help="few and short rounds")
    parser.add_argument("--csv", type=Path, default=CSV)
    args = parser.parse_args()
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if args.quick else (ROUNDS, SECONDS)
    if seconds > LEASE_SECONDS / 2:
        raise SystemExit(f"fs.lease-break-time: found {LEASE_SECONDS} s, wanted at least {2 * seconds:.0f}")
    check_header(args.csv, COLUMNS)
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-slow-") as folder:
        times = asyncio.run(run(Path(folder), rounds, seconds))
    row = row_of(times, rounds, seconds)
    append_row(args.csv, row)
    print(f"{'slides':8}{'requests':>10}{'p50 ms':>10}{'p99 ms':>10}{'p99 / none':>12}   95 % interval")
    for arm in ARMS:
        line = f"{arm:8}{row[f'requests_{arm}']:10,}{row[f'p50_ms_{arm}']:10.1f}{row[f'p99_ms_{arm}']:10.1f}"
        if arm != "none":
            ratio, low, high = (row[f"p99_ratio_{arm}{end}"] for end in ("", "_low", "_high"))
            line += f"{ratio:12.3f}   {low:.3f} .. {high:.3f}"
        print(line)
    if not args.quick and (missed := [arm for arm in ("slow", "full") if row[f"p99_ratio_{arm}_low"] > AIM]):
        raise SystemExit(f"p99 with slow slides ({', '.join(missed)}): found more than {AIM} times that without")


async def run(work: Path, rounds: int, seconds: float) -> dict[str, list[NDArray]]:
    """Times to the first token [ms] of each arm, by round."""
    media = work / "slides"
    media.mkdir()
    init_checkpoint(
        work / "checkpoint",
        TinySettings(feature_dim=D, hidden_size=64, scorer_hidden_size=32, max_position_embeddings=131072),
    )
    slides = Slides(media, seed=0)
    times: dict[str, list[NDArray]] = {arm: [] for arm in ARMS}
    with (
        TrickleServer(media).running() as web,
        VllmServer(work / "checkpoint", media, work / "server.log", SERVER_ARGS) as server,
    ):
        load = Load(server, slides, web)
        await load.ordinary(seconds)  # a server's first requests can take longer than a file can be held
        for number in range(rounds + 1):
            for arm in random.sample(list(ARMS), len(ARMS)):
                found = await load.arm(*ARMS[arm], seconds)
                if number:  # the first round is the warm-up
                    times[arm].append(np.array(found))
        await load.close()
    return times


def row_of(times: dict[str, list[NDArray]], rounds: int, seconds: float) -> dict:
    arms = {arm: np.concatenate(found) for arm, found in times.items()}
    values: list = [IN_FLIGHT, rounds, seconds]
    for found in arms.values():
        values += [len(found), *(round(float(np.percentile(found, q)), 2) for q in (50, 99))]
    for arm in ("slow", "full"):
        values += [round(x, 3) for x in p99_ratio(times[arm], times["none"])]
    return dict(zip(COLUMNS, values, strict=True))


def p99_ratio(over: list[NDArray], under: list[NDArray]) -> tuple[float, float, float]:
    """(ratio of the p99 of all rounds, ends of its 95 % interval); rounds are drawn together for both arms."""
    rng = np.random.default_rng(0)

    def ratio(chosen) -> float:
        above, below = (np.percentile(np.concatenate([arm[i] for i in chosen]), 99) for arm in (over, under))
        return float(above / below)

    drawn = [ratio(rng.integers(len(over), size=len(over))) for _ in range(BOOTSTRAPS)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return ratio(range(len(over))), float(low), float(high)


if __name__ == "__main__":
    main()
