"""Scoring and Top-K against what people run today: `python bench/kernels.py` on a CUDA machine.

One process, interleaved rounds in random order, a 256 MiB write between calls so that nothing lies in L2, medians
of CUDA events; every provider once launched eagerly and once replayed from a CUDA graph. Two ceilings are measured
in the same run, a device copy of X and the product X @ W, and every time is reported as a ratio to them and to the
best baseline; absolute times stand beside. `--device cpu` runs the same harness without graphs, to try it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from record import RESULTS, append_row, check_header
from torch import Tensor
from vllm_wsi.kernels import ScorerWeights, score_topk
from vllm_wsi.kernels.op import ScoredTopK

from vllm_wsi.sparsify.scorer import seeded_scorer

CSV = RESULTS / "kernels.csv"
COLUMNS = [
    "num_patches", "feature_dim", "hidden_size", "k", "dtype", "provider", "mode", "rounds",
    "median_us", "p20_us", "p80_us", "floor_us", "floor_over_time", "best_baseline_over_time",
]  # fmt: skip
CEILINGS = ("copy", "gemm")
OURS = "ours"
FLUSH_BYTES = 256 << 20

Provider = Callable[[], object]


def eager(x: Tensor, weights: ScorerWeights, k: int) -> tuple[Tensor, Tensor]:
    """What a user writes: LayerNorm, Linear, GELU, Linear, topk, index_select, in X's dtype."""
    w = [None if p is None or isinstance(p, float) else p.to(x.dtype) for p in weights]
    y = F.layer_norm(x, (x.shape[1],), w[0], w[1], weights.norm_eps)
    if w[2] is not None:
        y = F.gelu(F.linear(y, w[2], w[3]))
    scores = y @ w[4] + w[5]
    kept = torch.topk(scores, k).indices.sort().values
    return kept, x.index_select(0, kept)


def scores_and_torch_topk(x: Tensor, weights: ScorerWeights, k: int) -> tuple[Tensor, Tensor]:
    """Our scores behind torch.topk: shows what the selecting kernel is worth. Ties are torch's to break."""
    from vllm_wsi.kernels.score import fold_cached, score_triton

    kept = torch.topk(score_triton(x, fold_cached(weights, x.dtype)), k).indices.sort().values
    return kept, x.index_select(0, kept)


def providers(x: Tensor, weights: ScorerWeights, k: int) -> dict[str, Provider]:
    target, h = torch.empty_like(x), weights.hidden_weight
    product = torch.randn(x.shape[1], h.shape[0], device=x.device, dtype=x.dtype) if h is not None else None
    compiled = torch.compile(eager, dynamic=False)
    found: dict[str, Provider] = {
        "copy": lambda: target.copy_(x),
        "eager torch": lambda: eager(x, weights, k),
        OURS: lambda: score_topk(x, weights, k),
    }
    if product is not None:
        found["gemm"] = lambda: x @ product
    if x.is_cuda:
        found["torch.compile"] = lambda: compiled(x, weights, k)
        found["our scores + torch.topk"] = lambda: scores_and_torch_topk(x, weights, k)
    return found


def graphed(provider: Provider) -> Provider:
    """The provider, captured once and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            provider()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        provider()
    return graph.replay


def measure(calls: dict[str, Provider], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Microseconds of every call in interleaved rounds."""
    cuda = device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES if cuda else 1, dtype=torch.uint8, device=device)
    names, times = list(calls), {name: [] for name in calls}
    for turn in range(rounds + 3):  # the first three warm up
        random.shuffle(names)
        for name in names:
            flush.zero_()
            if cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                calls[name]()
                end.record()
                torch.cuda.synchronize()
                taken = begin.elapsed_time(end) * 1e3
            else:
                began = time.perf_counter()
                calls[name]()
                taken = (time.perf_counter() - began) * 1e6
            if turn >= 3:
                times[name].append(taken)
    return times


def check(x: Tensor, weights: ScorerWeights, k: int) -> None:
    """Refuses to time a wrong answer: our kept set must hold the best scores in float64, up to rounding."""
    found: ScoredTopK = score_topk(x, weights, k)
    exact = score_topk(x.double(), weights, k).all_scores
    worst_kept = exact[found.indices[0]].min()
    best = exact.topk(k).values.min()
    if (best - worst_kept).abs() > 2e-2 * exact.std():
        raise SystemExit(f"kernels: kept a patch {float(best - worst_kept):.3g} below the K-th best; not timing that")


def run_shape(n: int, d: int, h: int, k: int, dtype: torch.dtype, device: torch.device, rounds: int) -> None:
    x = torch.randn(n, d, device=device).to(dtype)
    weights = seeded_scorer("patch", d, h, seed=0).requires_grad_(False).weights().to(device)
    check(x, weights, k)
    modes = {"eager": providers(x, weights, k)}
    if device.type == "cuda":
        modes["graph"] = {name: graphed(provider) for name, provider in modes["eager"].items()}
    calls = {f"{mode}|{name}": call for mode, group in modes.items() for name, call in group.items()}
    times = measure(calls, rounds, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        mode, provider = name.split("|")
        floor = max(medians[f"{mode}|{c}"] for c in CEILINGS if f"{mode}|{c}" in medians)
        baselines = [v for key, v in medians.items() if key.split("|")[1] not in (*CEILINGS, OURS)]
        quantiles = statistics.quantiles(values, n=5)
        row = dict(
            zip(
                COLUMNS,
                [
                    n, d, h, k, str(dtype).removeprefix("torch."), provider, mode, rounds,
                    f"{medians[name]:.1f}", f"{quantiles[0]:.1f}", f"{quantiles[3]:.1f}", f"{floor:.1f}",
                    f"{floor / medians[name]:.3f}", f"{min(baselines) / medians[name]:.3f}",
                ],
                strict=True,
            )
        )  # fmt: skip
        append_row(CSV, row)
        print(
            f"{n:>9,} {d:>5} {h:>4} {k:>4}  {mode:6} {provider:24} {medians[name]:>10.1f} us"
            f"  floor/time {row['floor_over_time']:>6}  best baseline/time {row['best_baseline_over_time']:>6}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("kernels: found no CUDA device, wanted one; --device cpu --quick tries the harness alone")
    check_header(CSV, COLUMNS)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rounds = 3 if args.quick else args.rounds
    shapes = [(4_000, 512, 128, 32)]
    if not args.quick:
        shapes = [(n, d, h, 32) for n in (4_000, 16_000, 100_000, 400_000) for d in (512, 1536) for h in (0, 128, 256)]
        shapes += [(100_000, d, h, 32) for d in (1024, 2560) for h in (0, 128, 256, 512)]
        shapes += [(1_000_000, 512, 256, 32), (100_000, 1536, 256, 256)]
    for n, d, h, k in shapes:
        run_shape(n, d, h, k, dtype, device, rounds)


if __name__ == "__main__":
    main()
