"""Time over floor against the number of patches, of the newest run in the CSV.

    python -m bench.kernels.plot_score_topk [CSV]

One panel for each (d, h) that was measured at two or more N, one line for each provider; 1 is the floor. Shows CUDA
graphs behind a flushed L2 where the run has them. The picture lies beside the CSV.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from bench.common.record import RESULTS

CEILINGS = ("copy", "gemm")
PREFERRED = ("graph", "flushed")
K = "32"
COLUMNS_OF_PANELS = 3


def newest_run(path: Path) -> list[dict[str, str]]:
    """The rows of `score_topk` that the newest run with any of them measured, of one mode and one state of L2."""
    if not path.exists():
        raise SystemExit(f"plot_score_topk: found no {path.name}; bench/kernels/score_topk.py writes it")
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("part") == "score_topk" and row["k"] == K]
    if not rows:
        raise SystemExit(f"plot_score_topk: {path.name} holds no rows of score_topk with k={K}")
    newest = max(row["run"] for row in rows)
    rows = [row for row in rows if row["run"] == newest]
    views = [(row["mode"], row["l2"]) for row in rows]
    view = PREFERRED if PREFERRED in views else views[0]
    return [row for row, shown in zip(rows, views, strict=True) if shown == view]


def panels(rows: list[dict[str, str]]) -> dict[tuple[int, int], dict[str, list[tuple[int, float]]]]:
    """(d, h) to provider to [(N, time / floor)], sorted; (d, h) with one N only where there is no other."""
    found: dict[tuple[int, int], dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if row["provider"] not in CEILINGS:
            lines = found.setdefault((int(row["feature_dim"]), int(row["hidden_size"])), {})
            ratio = float(row["median_us"]) / float(row["floor_us"])
            lines.setdefault(row["provider"], []).append((int(row["num_patches"]), ratio))
    for lines in found.values():
        for points in lines.values():
            points.sort()
    several = {shape: lines for shape, lines in found.items() if max(map(len, lines.values())) > 1}
    return dict(sorted((several or found).items()))


def draw(rows: list[dict[str, str]], target: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plot_score_topk: matplotlib is not installed; `pip install matplotlib` brings it") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter, NullFormatter

    shapes = panels(rows)
    names = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] not in CEILINGS))
    width = min(COLUMNS_OF_PANELS, len(shapes))
    height = -(-len(shapes) // width)
    figure, axes = pyplot.subplots(
        height, width, figsize=(4.2 * width + 2, 3.2 * height + 1.4), sharey=True, squeeze=False, layout="constrained"
    )
    lines = {}
    for place, (shape, providers) in zip(axes.flat, shapes.items(), strict=False):
        for name, points in providers.items():
            style = {"color": f"C{names.index(name)}", "linewidth": 2.4 if name == "ours" else 1.3, "marker": "o"}
            (lines[name],) = place.plot(*zip(*points, strict=True), label=name, markersize=3.5, **style)
        place.axhline(1, color="black", linewidth=0.8, linestyle="--")
        place.set(xscale="log", yscale="log", title="d = {}, h = {}".format(*shape), xlabel="patches")
        sizes = sorted({n for points in providers.values() for n, _ in points})
        place.set_xticks(sizes, [f"{n / 1000:g}k" for n in sizes])
        place.xaxis.set_minor_formatter(NullFormatter())
        place.yaxis.set_major_formatter(LogFormatter())
        place.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        place.grid(visible=True, which="both", linewidth=0.3)
    for place in list(axes.flat)[len(shapes) :]:
        place.set_visible(False)
    for row_of_panels in axes:
        row_of_panels[0].set_ylabel("time / floor")
    first = rows[0]
    device = first["gpu"] if first["gpu"] != "none" else first["cpu"]
    figure.suptitle(
        f"Score and Top-K (k = {K}), {device}, {first['dtype']}, torch {first['torch']}, commit {first['commit']}\n"
        f"{first['mode']}, L2 {first['l2']}; dashed: the floor of the same run",
        fontsize=9,
    )
    ordered = [name for name in names if name in lines]
    figure.legend([lines[name] for name in ordered], ordered, loc="outside lower center", ncols=3, fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    print(target)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("csv", type=Path, nargs="?", default=RESULTS / "kernels.csv")
    return found


def main() -> None:
    args = parser().parse_args()
    draw(newest_run(args.csv), args.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
