"""Which launch configuration is the fastest on this card? `python -m bench.kernels.sweep`; one row for each that runs.

Every candidate scores and selects 100,000 patches in one launch; a copy of X in the same rounds is the floor. The last
lines propose the fastest for each shape, beside what `launch_table.py` has: a table for a card is changed by hand,
because another tile sums in another order and so changes the bits of scores.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import triton

from bench.common.record import RESULTS, append_row, check_header
from bench.kernels.providers import copy_of
from bench.kernels.score_topk import FLUSH_BYTES, timed
from vllm_wsi.kernels.buffers import Workspace
from vllm_wsi.kernels.fused import score_topk_triton
from vllm_wsi.kernels.launch_table import FusedConfig, LaunchConfig, card_of, fused_config, score_config
from vllm_wsi.selection.scorer import seeded_scorer

CSV = RESULTS / "sweep.csv"
COLUMNS = [
    "triton", "arch", "num_patches", "feature_dim", "hidden_size", "dtype", "block_m", "block_k", "num_warps",
    "num_stages", "programs_per_sm", "rounds", "median_us", "copy_us", "over_copy",
]  # fmt: skip
NUM_PATCHES, K = 100_000, 32
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--feature-dim", type=int, nargs="+", default=[512])
    found.add_argument("--hidden-size", type=int, nargs="+", default=[0, 64, 128, 256])
    found.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    found.add_argument("--rounds", type=int, default=30)
    found.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    return found


def candidates(d: int, h: int) -> Iterator[LaunchConfig]:
    if h == 0:
        for block_m, block_k in itertools.product((16, 32, 64), (64, 128, 256)):
            if d % block_k == 0:
                yield LaunchConfig(block_m, block_k, 4, 1)
        return
    for (block_m, num_warps), num_stages in itertools.product(((64, 4), (128, 4), (128, 8), (256, 8)), (2, 3, 4)):
        if block_m * h <= 128 * 256:  # more does not fit the registers
            yield LaunchConfig(block_m, 64, num_warps, num_stages)


def main() -> None:
    args = parser().parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("sweep: found no CUDA device, wanted one")
    check_header(args.csv, COLUMNS)
    for d, h, dtype in itertools.product(args.feature_dim, args.hidden_size, args.dtype):
        sweep(d, h, dtype, args.rounds, args.csv)


def sweep(d: int, h: int, dtype: str, rounds: int, csv: Path) -> None:
    """Measures all candidates of one shape that compile, in rounds that interleave them."""
    device = torch.device("cuda", torch.cuda.current_device())
    card = card_of(device)
    x = torch.randn(NUM_PATCHES, d, device=device, dtype=DTYPES[dtype])
    weights = seeded_scorer("patch", d, h, seed=0).requires_grad_(False).weights().to(device)
    workspace, flush = Workspace(device), torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    calls = {}
    for tile, at_once in itertools.product(candidates(d, h), (1, 2, 3)):
        config = FusedConfig(tile, at_once * card.multiprocessors)
        call = partial(score_topk_triton, x, weights, K, config, workspace=workspace)
        try:
            call()
            torch.cuda.synchronize()
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError):
            continue
        calls[tile, at_once] = call
    order: list = [("copy", copy_of(x)), *calls.items()]
    times: dict = {name: [] for name, _ in order}
    for _ in range(rounds):
        for name, call in random.sample(order, len(order)):
            flush.zero_()
            times[name].append(timed(call, cuda=True))
    medians = {name: statistics.median(values) for name, values in times.items()}
    copy = medians.pop("copy")
    for (tile, at_once), median in medians.items():
        append_row(csv, {
            "triton": triton.__version__, "arch": f"sm_{card.arch}", "num_patches": NUM_PATCHES, "feature_dim": d,
            "hidden_size": h, "dtype": dtype, **tile._asdict(), "programs_per_sm": at_once, "rounds": rounds,
            "median_us": f"{median:.1f}", "copy_us": f"{copy:.1f}", "over_copy": f"{median / copy:.3f}",
        })  # fmt: skip
    best = min(medians, key=lambda name: medians[name])
    present = score_config(card.arch, d, h, DTYPES[dtype])
    table = fused_config(card, weights, DTYPES[dtype], K)
    at_once = 0 if table is None else table.programs // card.multiprocessors
    now = medians.get((present, at_once))
    print(
        f"d = {d} h = {h} {dtype}: fastest {tuple(best[0])} x {best[1]} on an SM, {medians[best] / copy:.2f} copies; "
        f"the table has {tuple(present)} x {at_once}, {'not run' if now is None else f'{now / copy:.2f}'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
