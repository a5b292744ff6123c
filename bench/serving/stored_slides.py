"""What the selection store saves: `python -m bench.serving.stored_slides [--quick]`.

Part one: time to the first token of one request over HTTP, as `first_token.py` measures it, with a small decoder. One
server with a store; the cases alternate within every round:

- new: a slide that neither the server nor the store knows: it is read, scored, stored.
- stored: a slide that `vllm-wsi warm` selected before the server started. Not a row of it is read.
- remembered: another question about the stored slide of the same round: its selection is in the server's memory.
- text: no slide, padded to the same number of prompt tokens.

Every slide is a hard link of its own, made before anything else, because a new link changes the identity of the others.
Ratios of medians: stored / remembered, aimed at 1.3 at most, and stored / text.

Part two: two API servers, `--two-servers`: questions about new slides, four for each slide, from eight clients, without
a store and with one: selections made for each slide (aim: 1), and seconds in all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from openai import OpenAI

from bench.common.record import RESULTS, append_row, check_header
from bench.common.tables import read_rows
from bench.serving.first_token import SERVER_ARGS, Bench
from bench.serving.workload import sync_and_read
from vllm_wsi.model.init_checkpoint import init_checkpoint
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.slides.synthetic import write_synthetic_slide

FIRST_CSV, TWO_CSV = RESULTS / "stored_slides.csv", RESULTS / "two_api_servers.csv"
CASES = ("new", "stored", "remembered", "text")
FIRST_COLUMNS = (
    "num_patches", "feature_dim", "k", "rounds", "warm_seconds_a_slide", "store_bytes_a_slide",
    *(f"{case}_{what}_ms" for case in CASES for what in ("median", "p90")),
    "stored_over_remembered", "stored_over_text",
)  # fmt: skip
TWO_COLUMNS = ("num_patches", "feature_dim", "slides", "requests", "store", "selections_a_slide", "seconds")
FEATURE_DIM, DTYPE, K = 512, "float16", 32
ROUNDS = {10_000: 20, 100_000: 20, 1_000_000: 8}
QUICK_ROUNDS = {1_000: 5}
WARM_UP_ROUNDS = 2
TWO_PATCHES, TWO_SLIDES, ASKED, CLIENTS = 100_000, 16, 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small slide and few rounds")
    parser.add_argument("--two-servers", action="store_true", help="part two")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    if args.two_servers:
        csv = args.csv or TWO_CSV
        check_header(csv, TWO_COLUMNS)
        for with_store in (False, True):
            show(csv, two_servers(with_store, 4 if args.quick else TWO_SLIDES, 1_000 if args.quick else TWO_PATCHES))
        return
    csv = args.csv or FIRST_CSV
    check_header(csv, FIRST_COLUMNS)
    for num_patches, rounds in (QUICK_ROUNDS if args.quick else ROUNDS).items():
        show(csv, first_tokens(num_patches, rounds))


def show(csv: Path, row: dict) -> None:
    append_row(csv, row)
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def first_tokens(num_patches: int, rounds: int) -> dict:
    """The row of one N."""
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-bench-") as folder:
        work = Path(folder)
        numbers = range(WARM_UP_ROUNDS + rounds)
        new, stored = ([work / f"{name}-{i}.safetensors" for i in numbers] for name in ("new", "stored"))
        make_slides(work, num_patches, [*new, *stored])
        checkpoint, store = make_checkpoint(work), work / "store"
        warm_seconds = warm(checkpoint, store, stored, work / "summary.csv")
        size = sum(file.stat().st_size for file in store.rglob("*.safetensors")) // len(stored)
        times: dict[str, list[float]] = {case: [] for case in CASES}
        with start(checkpoint, work, store) as server:
            bench = Bench(server)
            for number in numbers:
                one = one_round(bench, new[number], stored[number])
                if number >= WARM_UP_ROUNDS:
                    for case, ms in one.items():
                        times[case].append(ms)
            if (made := bench.counter("selections")) != len(new):
                raise SystemExit(f"found {made:.0f} slides that were read, wanted {len(new)}, the new ones alone")
    medians = {case: float(np.median(values)) for case, values in times.items()}
    values = (
        num_patches, FEATURE_DIM, K, rounds, round(warm_seconds, 3), size,
        *(round(x, 2) for case in CASES for x in (medians[case], float(np.percentile(times[case], 90)))),
        round(medians["stored"] / medians["remembered"], 3), round(medians["stored"] / medians["text"], 3),
    )  # fmt: skip
    return dict(zip(FIRST_COLUMNS, values, strict=True))


def warm(checkpoint: Path, store: Path, slides: list[Path], summary: Path) -> float:
    """Mean seconds of a slide, by the command, on all cores."""
    program = str(Path(sys.executable).parent / "vllm-wsi")
    command = [program, "warm", *map(str, slides), "--checkpoint", str(checkpoint)]
    subprocess.run([*command, "--store", str(store), "--summary", str(summary)], check=True, capture_output=True)
    return float(np.mean([float(row["seconds"]) for row in read_rows(summary)]))


def one_round(bench: Bench, new: Path, stored: Path) -> dict[str, float]:
    """Milliseconds of each case; «remembered» follows «stored», the others lie at random places among them."""
    steps = ["stored", "remembered"]
    for case in ("new", "text"):
        steps.insert(random.randrange(len(steps) + 1), case)
    times, tokens = {}, set()
    for case in steps:
        times[case], count = bench.text() if case == "text" else bench.slide(new if case == "new" else stored)
        tokens.add(count)
    if len(tokens) != 1:
        raise SystemExit(f"prompts: found {sorted(tokens)} tokens, wanted one number for all cases")
    return times


def two_servers(with_store: bool, num_slides: int, num_patches: int) -> dict:
    """The row of two API servers, with a store or without."""
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-bench-") as folder:
        work = Path(folder)
        slides = [work / f"slide-{i}.safetensors" for i in range(num_slides)]
        make_slides(work, num_patches, slides)
        asked = slides * ASKED
        random.Random(0).shuffle(asked)
        store = work / "store" if with_store else None
        with start(make_checkpoint(work), work, store, "--api-server-count", "2") as server:

            def ask(path: Path) -> None:
                """On a connection of its own, so that any of the two servers may get it."""
                with OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=300) as client:
                    image = {"type": "image_url", "image_url": {"url": path.as_uri()}}
                    content = [image, {"type": "text", "text": "Is there tumour?"}]
                    client.chat.completions.create(
                        model=server.model, messages=[{"role": "user", "content": content}], max_tokens=1, temperature=0
                    )

            began = time.perf_counter()
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(ask, asked))
            seconds = time.perf_counter() - began
            selections = server.metrics()["vllm_wsi:selections_total"] / num_slides
    values = (num_patches, FEATURE_DIM, num_slides, len(asked), with_store, round(selections, 2), round(seconds, 2))
    return dict(zip(TWO_COLUMNS, values, strict=True))


def make_slides(work: Path, num_patches: int, links: list[Path]) -> None:
    original = work / "original.safetensors"
    write_synthetic_slide(original, num_patches, FEATURE_DIM, dtype=DTYPE)
    sync_and_read(original)
    for link in links:
        os.link(original, link)


def make_checkpoint(work: Path) -> Path:
    settings = TinySettings(feature_dim=FEATURE_DIM, max_position_embeddings=131072, num_slide_tokens=K)
    init_checkpoint(work / "checkpoint", settings)
    return work / "checkpoint"


def start(checkpoint: Path, work: Path, store: Path | None, *args: str, **more: str) -> VllmServer:
    """`more`: of its environment."""
    options = {} if store is None else {"selection_store": str(store), "selection_store_gib": 100}
    env = {"VLLM_WSI_STORE": None, **more}
    args = (*SERVER_ARGS, "--mm-processor-kwargs", json.dumps(options), *args)
    return VllmServer(checkpoint, work, work / "server.log", args, env)


if __name__ == "__main__":
    main()
