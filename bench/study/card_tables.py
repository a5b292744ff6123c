"""Writes the tables of the two packaged checkpoints' model cards, between their `<!-- card:NAME -->` marks.

    python -m bench.study.card_tables

All numbers come from the CSV files in `bench/results/` and from the checkpoints' own `calibration.json`.
"""

from __future__ import annotations

import json

from bench.common.record import RESULTS, ROOT
from bench.common.tables import interval, read_rows, table, write_tables
from vllm_wsi.stats import proportion_interval

PAGES = {
    "haystack": ROOT / "vllm_wsi" / "haystack" / "demo_checkpoint" / "README.md",
    "tissue": ROOT / "vllm_wsi" / "tissue" / "checkpoint" / "README.md",
}
POLICIES = {
    "learned": "the 32 of the scorer", "oracle": "the key patches alone", "random": "32 random patches",
    "uniform": "32 evenly spaced patches", "blind": "no slide",
}  # fmt: skip
CASES = ("text", "K = 32", "K = 32, known", "K = 4096")
FOLD = "0"  # of the tissue checkpoint in the package
LENGTHS = ("256", "1024", "4096")
KINDS = {"presence": "Is there invasive carcinoma?", "share_sentence": "How much of the slide?"}


def main() -> None:
    haystack = {"policies": policies(), "speed": speed(), "trust": trust("trust"), "fit": fit("haystack")}
    tissue = {"answers": answers(), "scores": scores(), "trust": trust("trust_tissue"), "fit": fit("tissue")}
    for name, tables in (("haystack", haystack), ("tissue", tissue)):
        write_tables(PAGES[name], {f"card:{part}": made for part, made in tables.items()})


def policies() -> str:
    """Right answers by what the decoder is shown, at the positions that the checkpoint was trained with."""
    rows = [row for row in read_rows(RESULTS / "study" / "policies.csv") if row["positions"] == "original"]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    cells = {(row["policy"], row["length"]): interval(row, "accuracy", "low", "high") for row in rows}
    counts = {row["length"]: row["questions"] for row in rows}
    head = ["shown", *(f"N = {int(length):,} ({counts[length]} slides)" for length in lengths)]
    return table(head, ([said, *(cells[name, length] for length in lengths)] for name, said in POLICIES.items()))


def speed() -> str:
    """The newest run of the serving benchmark, eight requests at once."""
    rows = [row for row in read_rows(RESULTS / "serving.csv") if row["decoder"] == "demo" and row["part"] == "compare"]
    newest = max(row["run"] for row in rows)
    found = {row["case"]: row for row in rows if (row["run"], row["server"]) == (newest, "as it is")}
    columns = ("requests_per_s", "ttft_p50_ms", "ttft_p99_ms")
    head = ["request", "requests/s", "first token, median, ms", "99th percentile, ms"]
    return table(head, ([case, *(f"{float(found[case][one]):,.4g}" for one in columns)] for case in CASES))


def answers() -> str:
    """Written answers of the packaged fold from its own 32 patches, of all lengths together, with exact intervals."""
    found: dict[str, dict[str, list[int]]] = {kind: {} for kind in KINDS}
    for row in read_rows(RESULTS / "tissue" / "answers.csv"):
        if (row["fold"], row["policy"]) == (FOLD, "learned") and row["length"] in LENGTHS:
            found[row["kind"]].setdefault(row["share"], []).append(int(row["written_correct"]))
    shares = sorted({share for cells in found.values() for share in cells}, key=float)
    heads = [f"{float(share):.0%}" if float(share) else "none" for share in shares]
    lines = [[KINDS[kind], *(_counted(cells[share]) for share in shares)] for kind, cells in found.items()]
    return table(["question, by tumour on the slide", *heads], lines)


def scores() -> str:
    """How well the packaged scorer, and a linear probe that was trained on labels, rank patches."""
    lines = [
        [row["patches"], row["policy"], row["num_patches"], row["num_tumour"]]
        + [f"{float(row[name]):.2f}" for name in ("auc", "precision")]
        for row in read_rows(RESULTS / "tissue" / "scores.csv")
        if row["fold"] == FOLD
    ]
    return table(["patches", "ranked by", "number", "of tumour", "AUC", "tumour among the best 32"], lines)


def trust(name: str) -> str:
    """What tests said of the calibration."""
    head = ["slides", "N", "right", "confidence", "calibration error", "sufficiency: AUROC", "enough, shown / lacking"]
    lines = []
    for row in read_rows(RESULTS / "study" / f"{name}.csv"):
        said = [f"{float(row[one]):.2f}" for one in ("confidence", "calibration_error", "sufficiency_auroc")]
        enough = " / ".join(f"{float(row[f'enough_of_{one}']):.2f}" for one in ("shown", "lacking"))
        right = interval(row, "accuracy", "accuracy_low", "accuracy_high")
        unlike = f"{float(row['told_unlike']):.2f}"
        lines.append([row["world"], f"{int(row['num_patches']):,}", right, *said, enough, unlike])
    return table([*head, "told unlike"], lines)


def fit(name: str) -> str:
    """What `calibration.json` holds, in words."""
    found = json.loads((PAGES[name].parent / "calibration.json").read_text())
    shortest, longest = found["num_patches"]
    lines = [
        ["temperature of the answers", f"{found['temperature']:.2f}"],
        ["sufficiency of 95 % of the validation slides that show what is asked for", f"{found['enough']:.2f}"],
        ["validation slides", f"{found['num_slides']:,}"],
        ["patches of the shortest and of the longest", f"{shortest:,} and {longest:,}"],
    ]
    return table(["fitted to validation", "value"], lines)


def _counted(right: list[int]) -> str:
    found = proportion_interval(sum(right), len(right))
    return f"{sum(right)} of {len(right)} [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main()
