"""Tables of docs/measure/serving.md, and figures, from the newest run of each decoder in `bench/results/serving.csv`.

`python -m bench.serving.throughput_report`; the figures are `bench/results/serving-DECODER.png`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from bench.common.record import RESULTS, ROOT
from bench.common.tables import table, write_tables

Row = dict[str, str]
FLOOR = "text"
PAGE = ROOT / "docs" / "measure" / "serving.md"
# part: (title, x axis, [(column, label, scale)], log-log?)
PARTS = {
    "patches": ("one new slide", "patches N", "ttft_p50_ms", "time to first token, ms"),
    "at once": ("concurrency", "requests at once", "requests_per_s", "requests / s"),
    "slides": ("variety", "distinct new slides in 64 requests", "requests_per_s", "requests / s"),
    "tokens": ("slide tokens, no prefix cache", "K", "requests_per_s", "requests / s"),
}


def main() -> None:
    tables: dict[str, str] = {}
    for decoder, rows in newest_runs().items():
        draw(decoder, rows)
        found = {f"serving:{decoder}:compare": compared(rows), f"serving:{decoder}:growth": grown(rows)}
        if f"serving:{decoder}:" in PAGE.read_text():
            tables |= found
        else:  # a decoder that the page does not speak of
            print(*found.values(), sep="\n")
    write_tables(PAGE, tables)


def newest_runs() -> dict[str, list[Row]]:
    """Rows of the newest run of each decoder."""
    with open(RESULTS / "serving.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    newest = {row["decoder"]: row["run"] for row in sorted(rows, key=lambda row: row["run"])}
    return {decoder: [row for row in rows if row["run"] == run] for decoder, run in newest.items()}


def compared(rows: Sequence[Row]) -> str:
    """Each case beside the floor of its own server; a crowd beside the crowd's."""
    chosen = [row for row in rows if row["part"] in ("compare", "crowd")]
    floors = {(row["part"], row["server"]): number(row, "requests_per_s") for row in chosen if row["case"] == FLOOR}
    lines = []
    for row in chosen:
        of_floor = number(row, "requests_per_s") / floors[row["part"], row["server"]]
        latencies = (
            " / ".join(f"{number(row, f'{name}_p{p}_ms'):.0f}" for p in (50, 90, 99)) for name in ("ttft", "itl")
        )
        hits = (row[f"{name}_cache_hit_rate"] for name in ("selection", "prefix"))
        lines.append(
            [
                row["case"],
                row["server"],
                row["concurrency"],
                f"{number(row, 'requests_per_s'):.1f}",
                f"{of_floor:.2f}",
                *latencies,
                row["kv_blocks_per_request"],
                f"{number(row, 'request_body_bytes') / 1024:,.1f}",
                f"{number(row, 'bytes_to_engine') / 1024:,.1f}",
                " / ".join(f"{float(hit):.2f}" if hit else "-" for hit in hits),
            ]
        )
    head = ["case", "server", "at once", "requests/s", "of text", "TTFT p50 / 90 / 99, ms", "between tokens, ms"]
    head += ["KV blocks", "request, KiB", "to engine, KiB", "hits: selection / prefix"]
    return table(head, lines)


def grown(rows: Sequence[Row]) -> str:
    """What grows, from where to where, and the slope of a straight line through the logarithms."""
    lines = []
    for part, (title, axis, column, label) in PARTS.items():
        for case, (x, y) in curves(rows, part, column).items():
            slope = np.polyfit(np.log(x), np.log(y), 1)[0]
            values = ", ".join(f"{a:,.0f}: {b:,.3g}" for a, b in zip(x, y, strict=True))
            lines.append([f"{title} ({case})", axis, label, values, f"{slope:.2f}"])
    return table(["what", "x", "y", "x: y", "log-log slope"], lines)


def draw(decoder: str, rows: Sequence[Row]) -> None:
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (part, (title, axis, column, label)) in zip(figure.subplots(2, 2).flat, PARTS.items(), strict=True):
        for case, (x, y) in curves(rows, part, column).items():
            axes.loglog(x, y, "o-", label=case)
        axes.set(title=title, xlabel=axis, ylabel=label)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
    one = rows[0]
    figure.suptitle(f"{decoder} decoder, d = {one['feature_dim']}, {one['cores']} cores, GPU: {one['gpu']}")
    figure.savefig(RESULTS / f"serving-{decoder}.png", dpi=110)


def curves(rows: Sequence[Row], part: str, column: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for case in dict.fromkeys(row["case"] for row in rows if row["part"] == part):
        points = sorted(
            (number(row, "x"), number(row, column)) for row in rows if (row["part"], row["case"]) == (part, case)
        )
        found[case] = (np.array([x for x, _ in points]), np.array([y for _, y in points]))
    return found


def number(row: Row, column: str) -> float:
    return float(row[column])


if __name__ == "__main__":
    main()
