"""What pooled means cost beside a selection, on one core: `python -m bench.study.summary_cost [--quick]`.

The slides are synthetic fp16 files of N = 100,000 patches, read from a warm page cache. Each round measures one
selection (K = 32, h = 256) and then, in turns, for each S: finding the centres on the sample (its rows are read one by
one), and the pass that normalises, labels and adds every row. Medians of CPU seconds, because other work shares the
cores. A pass beside the scorer would read each chunk once for both, so the time to read is left out; it normalises
anew, which a fused pass need not. `stretches` adds rows to S pools by their places, without centres. Each pass runs
twice, in chunks of two sizes, and `same_bits` says whether sums and counts agree bit by bit. `summary tokens` is what
`SlideSelector(.., summary_tokens=S)` takes longer than without, all in all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.common.record import RESULTS, append_row, check_header
from vllm_wsi.selection.chunk_reader import ChunkReader, read_tensor_rows
from vllm_wsi.selection.evenly_spaced import evenly_spaced
from vllm_wsi.selection.scorer import FrozenScorer, frozen_scorer, seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.selection.slide_pools import normalised
from vllm_wsi.slides import FeatureFile, open_features
from vllm_wsi.slides.synthetic import write_synthetic_slide

from .pooled_means import SAMPLE, Centres, Pools, add_chunk, empty_pools, pooled, sample_centres

CSV = RESULTS / "study" / "summary_cost.csv"
COLUMNS = (
    "num_patches", "feature_dim", "k", "scorer_hidden_size", "rest", "s", "rounds", "select_cpu_seconds",
    "centres_cpu_seconds", "pass_cpu_seconds", "added_over_select", "same_bits",
)  # fmt: skip
K, HIDDEN = 32, 256
CHUNK_ROWS = (8192, 5000)
SERVED = ("summary tokens", 8)
PLACE_ROWS = 256  # of a slide that are normalised and added at once, by place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10,000 patches, one round")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    num_patches, rounds = (10_000, 1) if args.quick else (100_000, 3)
    for feature_dim in (512, 1024):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "slide.h5"
            write_synthetic_slide(path, num_patches, feature_dim, dtype="float16")
            with open_features(path) as slide:
                for row in measured(slide, rounds):
                    append_row(args.csv, row)
                    print(*row.values(), flush=True)


def measured(slide: FeatureFile, rounds: int) -> list[dict[str, object]]:
    scorer = frozen_scorer(seeded_scorer("patch", slide.feature_dim, HIDDEN, seed=0))
    selector = SlideSelector(scorer, K)
    cases = [("k-means", 4), ("k-means", 8), ("k-means", 16), ("k-means of equal size", 8), ("stretches", 8), SERVED]
    selections: list[float] = []
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    same = dict.fromkeys(cases, True)
    for _ in range(rounds):
        selections.append(cpu_seconds(lambda: selector.select(slide)))
        took, is_same = with_summary(slide, scorer)
        seconds[SERVED].append((0.0, took - selections[-1]))
        same[SERVED] &= is_same
        for rest, s in cases[:-1]:
            centres, began = None, time.process_time()
            if rest != "stretches":
                rows = read_tensor_rows(slide, evenly_spaced(SAMPLE, slide.num_patches))
                centres = sample_centres(normalised(rows), s, rest.endswith("equal size"))
            found = time.process_time() - began
            (first, in_pass), (second, _) = (one_pass(slide, centres, s, rows) for rows in CHUNK_ROWS)
            same[rest, s] &= torch.equal(first.sums, second.sums) and torch.equal(first.counts, second.counts)
            seconds[rest, s].append((found, in_pass))
    row: dict[str, object] = {"num_patches": slide.num_patches, "feature_dim": slide.feature_dim, "k": K}
    row |= {"scorer_hidden_size": HIDDEN, "rounds": rounds}
    made = []
    for (rest, s), times in seconds.items():
        select, (centre, added) = statistics.median(selections), map(statistics.median, zip(*times, strict=True))
        values = (select, centre, added, (centre + added) / select, same[rest, s])
        full = row | {"rest": rest, "s": s} | dict(zip(COLUMNS[-5:], values, strict=True))
        made.append({name: round(one, 4) if isinstance(one := full[name], float) else one for name in COLUMNS})
    return made


def with_summary(slide: FeatureFile, scorer: FrozenScorer) -> tuple[float, bool]:
    """(CPU seconds of one selection with summary tokens, whether other chunks give their same bits)."""
    began = time.process_time()
    found = SlideSelector(scorer, K, summary_tokens=SERVED[1]).select(slide).pooled
    seconds = time.process_time() - began
    again = SlideSelector(scorer, K, chunk_rows=CHUNK_ROWS[1], summary_tokens=SERVED[1]).select(slide).pooled
    assert found is not None
    assert again is not None
    return seconds, torch.equal(found, again)


def one_pass(slide: FeatureFile, centres: Centres | None, s: int, chunk_rows: int) -> tuple[Pools, float]:
    """(Pools of all patches, CPU seconds without reading)."""
    pools, seconds = empty_pools(s, slide.feature_dim), 0.0
    for start, chunk in ChunkReader(slide, chunk_rows=chunk_rows).chunks():
        began = time.process_time()
        if centres is None:
            pools = add_stretches(pools, chunk, start, slide.num_patches)
        else:
            pools = add_chunk(pools, centres, chunk, start)
        seconds += time.process_time() - began
    return pools, seconds


def add_stretches(pools: Pools, chunk: torch.Tensor, first_row: int, num_patches: int) -> Pools:
    """The pools with a further chunk: row i belongs to stretch floor(i S / N)."""
    count = len(pools.counts)
    for start in range(0, len(chunk), PLACE_ROWS):
        part = chunk[start : start + PLACE_ROWS]
        labels = (first_row + start + torch.arange(len(part))) * count // num_patches
        found = pooled(normalised(part), labels, count)
        pools = Pools(pools.sums + found.sums, pools.counts + found.counts)
    return pools


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
