"""What `throughput.py` compares, and what it lets grow.

Every K is asked of the same servers (`#k=32` of one whose own K is 4,096), so that the decoder is one and the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.serving.measure import Bench, Case, Sizes
from bench.serving.vllm_client import run_load
from bench.serving.workload import MEDIAN_PATCHES, Asked, log_normal_sizes, zipf_picks

K, LARGE_K = 32, 4096
AS_IT_IS, NO_PREFIX, TWO_SERVERS, ON_THE_GPU = "as it is", "no prefix cache", "2 API servers", "selection on the GPU"
FULL = Sizes()
QUICK = Sizes(
    rounds=1, slides=4, most_patches=5_000, requests=6, slow_requests=4, concurrency=2, crowd=4, output_tokens=2,
    patches=(1_000, 3_000), at_once=(1, 2), distinct=(1, 2), tokens=(8, 64),
)  # fmt: skip
REPEATS = 5


def warm_up(bench: Bench) -> None:
    """First requests, which import and compile; nothing of them is kept."""
    slides = bench.work.slides([2_000] * 8, "warm-up")
    for server in bench.servers.values():
        for k in (K, LARGE_K):
            run_load(server, bench.work.ask(slides, range(len(slides)), k), len(slides), bench.sizes.output_tokens)


def known_slides(bench: Bench, sizes: Sequence[int], name: str) -> list[Path]:
    """Slides that every server has been asked about, four times: which of two API servers answers is chance."""
    slides = bench.work.slides(sizes, name)
    for server in bench.servers.values():
        for _ in range(4):
            run_load(server, bench.work.ask(slides, range(len(slides)), K, known=True), bench.sizes.concurrency, 1)
    return slides


def compare(bench: Bench) -> None:
    """K = 32 against what is done today, and against the floor: the same question without a slide.

    Slides are new to a server when a data set begins, but where they are "known".
    "selected" asks about files that hold the 32 kept patches alone: selection off the hot path. "by value" sends the
    feature file in the request, as a data URL.
    """
    sizes, work = bench.sizes, bench.work
    slides = work.slides(log_normal_sizes(sizes.slides, sizes.most_patches), "slide")
    selected = work.slides([K] * sizes.slides, "selected")
    few, many, c = sizes.slow_requests, sizes.requests, sizes.concurrency

    def picks(number: int, requests: int = many) -> list[int]:
        return zipf_picks(len(slides), requests, seed=number)

    known = known_slides(bench, log_normal_sizes(sizes.slides, sizes.most_patches), "known")
    cases = []
    for server in bench.servers:
        cases += [
            Case("text", server, 0, c, lambda _: work.text(many)),
            Case("K = 32", server, K, c, lambda number: work.ask(slides, picks(number), K)),
            Case("K = 32, known", server, K, c, lambda number: work.ask(known, picks(number), K, known=True)),
        ]
        if server in (AS_IT_IS, NO_PREFIX):
            cases.append(Case("K = 4096", server, LARGE_K, c, lambda number: work.ask(slides, picks(number, few))))
    cases += [
        Case("selected", AS_IT_IS, K, c, lambda number: work.ask(selected, picks(number), K)),
        Case("by value", AS_IT_IS, K, c, lambda number: work.ask_by_value(slides, picks(number, few), K)),
    ]
    bench.measure("compare", cases, sizes.rounds)


def crowd(bench: Bench) -> None:
    """As many requests at once as there are requests, each about a slide of its own."""
    sizes, work = bench.sizes, bench.work
    lengths, everyone = log_normal_sizes(sizes.crowd, sizes.most_patches // 10), range(sizes.crowd)
    slides, known = work.slides(lengths, "crowd"), known_slides(bench, lengths, "known-crowd")
    cases = []
    for server in (server for server in bench.servers if server != NO_PREFIX):
        cases += [
            Case("text", server, 0, sizes.crowd, lambda _: work.text(sizes.crowd)),
            Case("K = 32", server, K, sizes.crowd, lambda _: work.ask(slides, everyone, K)),
            Case("K = 32, known", server, K, sizes.crowd, lambda _: work.ask(known, everyone, K, known=True)),
        ]
    bench.measure("crowd", cases, sizes.rounds)


def growth(bench: Bench) -> None:
    """One thing grows at a time: N, requests at once, distinct slides, K."""
    sizes, work = bench.sizes, bench.work
    few, many, c = sizes.slow_requests, sizes.requests, sizes.concurrency

    def fixed(slides: Sequence[Path], picks: Sequence[int], k: int = K) -> Callable[[int], Asked]:
        """The same picks in every round."""
        return lambda _: work.ask(slides, picks, k)

    cases = []
    for path, n in zip(work.slides(sizes.patches, "growing"), sizes.patches, strict=True):
        cases.append(Case("new slide", AS_IT_IS, K, 1, fixed([path] * REPEATS, range(REPEATS)), n))
    bench.measure("patches", cases, 1)

    slides = work.slides([min(MEDIAN_PATCHES, sizes.most_patches)] * max(sizes.distinct), "median")

    def drawn(number: int) -> Asked:
        return work.ask(slides, zipf_picks(len(slides), many, number), K)

    cases = []
    for n in sizes.at_once:
        cases += [Case("text", AS_IT_IS, 0, n, lambda _: work.text(many), n), Case("K = 32", AS_IT_IS, K, n, drawn, n)]
    bench.measure("at once", cases, 1)

    cases = []
    for n in sizes.distinct:
        cases.append(Case("K = 32", AS_IT_IS, K, c, fixed(slides, [i % n for i in range(many)]), n))
    bench.measure("slides", cases, 1)

    cases = []
    for k in sizes.tokens:
        picks = [i % 4 % len(slides) for i in range(few if k > 512 else many)]
        cases.append(Case("K", NO_PREFIX, k, c, fixed(slides, picks, k), k))
    bench.measure("tokens", cases, 1)
