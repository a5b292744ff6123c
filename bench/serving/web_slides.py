"""Slides on the web, new and again: `python -m bench.serving.web_slides [--quick]`.

Time to the first token of one request over HTTP, as `first_token.py` measures it, with a small decoder. Two web servers
on this machine hold the same slides: one gives ranges, the other only whole bodies. As object storage does, each adds a
delay to every answer and bounds each connection (`--delay-ms`, `--mb-a-second`). The cases alternate in every round:

- disk: a new slide of a `file://` URL.
- ranges: a new slide, by ranges, scored while it arrives.
- whole: a new slide of the server that gives no ranges: downloaded, then read.
- again: another question about the slide of `ranges`: one byte is asked for.
- remembered: another question about the slide of `disk`.

Ratios of medians: ranges / whole, and again less remembered in milliseconds, aimed at one small request (the delay, and
what a request costs beside it).
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.common.record import RESULTS, append_row, check_header
from bench.serving.first_token import Bench
from bench.serving.stored_slides import FEATURE_DIM, K, make_checkpoint, make_slides, start

CSV = RESULTS / "web_slides.csv"
CASES = ("disk", "ranges", "whole", "again", "remembered")
COLUMNS = (
    "num_patches", "feature_dim", "k", "rounds", "delay_ms", "mb_a_second_of_a_connection",
    *(f"{case}_{what}_ms" for case in CASES for what in ("median", "p90")),
    "ranges_over_whole", "again_less_remembered_ms",
)  # fmt: skip
ROUNDS = {10_000: 20, 100_000: 12, 1_000_000: 4}
QUICK_ROUNDS = {1_000: 5}
WARM_UP_ROUNDS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small slide and few rounds")
    parser.add_argument("--delay-ms", type=float, default=20, help="before each answer (default 20)")
    parser.add_argument("--mb-a-second", type=float, default=80, help="of a connection; 0: no bound (default 80)")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    for num_patches, rounds in (QUICK_ROUNDS if args.quick else ROUNDS).items():
        row = first_tokens(num_patches, rounds, args.delay_ms, args.mb_a_second)
        append_row(args.csv, row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def first_tokens(num_patches: int, rounds: int, delay_ms: float, rate: float) -> dict:
    """The row of one N."""
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-bench-") as folder:
        work = Path(folder)
        numbers = range(WARM_UP_ROUNDS + rounds)
        new = {case: [work / f"{case}-{i}.safetensors" for i in numbers] for case in ("disk", "ranges", "whole")}
        make_slides(work, num_patches, [path for paths in new.values() for path in paths])
        times: dict[str, list[float]] = {case: [] for case in CASES}
        with (
            web_server(work, delay_ms, rate) as ranges,
            web_server(work, delay_ms, rate, "--whole") as whole,
            start(make_checkpoint(work), work, None, VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB="0") as server,
        ):
            bench = Bench(server)
            for number in numbers:
                urls = {
                    "disk": new["disk"][number].as_uri(),
                    "ranges": f"{ranges}/{new['ranges'][number].name}",
                    "whole": f"{whole}/{new['whole'][number].name}",
                }
                for case, ms in one_round(bench, urls).items():
                    if number >= WARM_UP_ROUNDS:
                        times[case].append(ms)
            if (made := bench.counter("selections")) != 3 * len(numbers):
                raise SystemExit(
                    f"found {made:.0f} slides that were read, wanted {3 * len(numbers)}, the new ones alone"
                )
            if bench.counter("ranges_given_up"):
                raise SystemExit("found slides whose ranges were given up, wanted none")
    medians = {case: float(np.median(values)) for case, values in times.items()}
    values = (
        num_patches, FEATURE_DIM, K, rounds, delay_ms, rate,
        *(round(x, 2) for case in CASES for x in (medians[case], float(np.percentile(times[case], 90)))),
        round(medians["ranges"] / medians["whole"], 3), round(medians["again"] - medians["remembered"], 2),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def one_round(bench: Bench, urls: dict[str, str]) -> dict[str, float]:
    """Milliseconds of each case; a slide is asked about again at some time after it was new."""
    steps = random.sample(list(urls), len(urls))
    for case, first in (("again", "ranges"), ("remembered", "disk")):
        steps.insert(random.randint(steps.index(first) + 1, len(steps)), case)
    sources = urls | {"again": urls["ranges"], "remembered": urls["disk"]}
    return {case: bench.url(sources[case])[0] for case in steps}


@contextmanager
def web_server(folder: Path, delay_ms: float, rate: float, *options: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    program = Path(__file__).with_name("range_server.py")
    command = [sys.executable, str(program), str(folder), str(delay_ms), str(rate), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


if __name__ == "__main__":
    main()
