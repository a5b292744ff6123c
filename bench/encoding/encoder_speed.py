"""Patches a second of the encoders that run everywhere, and where the time goes.

    python -m bench.encoding.encoder_speed [SLIDE ...] [--rounds N]

Without a slide it takes ../shared/data/slides/CMU-1-Small-Region.svs where that is there (by efficientnet-lite0 on a
closer grid), and the demo's photograph (scikit-image, 512 x 512 in patches of 32 px) always. Each slide is encoded once
unmeasured, so that imports and the page cache are warm, then `--rounds` times; medians. One process, one thread of
reading beside one of encoding (PyTorch's own threads apart): reading and encoding overlap, so that their shares are of
the sum of all stages' own seconds, not of the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from bench.common.record import RESULTS, ROOT, append_row, check_header
from vllm_wsi.cli.demo_slides import write_photograph
from vllm_wsi.encoding.encode_slide import EncodeSettings, encode_slide
from vllm_wsi.encoding.encoders import BUILT_IN, LITE, load_encoder

CSV = RESULTS / "encode.csv"
STAGES = ("reading", "tissue", "encoding", "writing")
COLUMNS = (
    "slide", "encoder", "patch_px", "step_px", "num_patches", "rounds", "seconds", "patches_per_second",
    *(f"{stage}_share" for stage in STAGES),
)  # fmt: skip
STEP_PX = 10
REAL_SLIDE = ROOT.parent / "shared/data/slides/CMU-1-Small-Region.svs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Patches a second of the encoders that run everywhere.")
    parser.add_argument("slides", nargs="*", type=Path, metavar="SLIDE")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    head = f"{'encoder':20}{'slide':28}{'patches':>9}{'s':>8}{'patches/s':>11}"
    print(head + "".join(f"{stage:>10}" for stage in STAGES))
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-bench-") as folder:
        work = Path(folder)
        pairs = [(BUILT_IN, EncodeSettings()), (LITE, EncodeSettings(step_px=STEP_PX))]
        paths = [path for path in args.slides or [REAL_SLIDE] if path.exists() or args.slides]
        cases = [(path, *pair) for path in paths for pair in pairs]
        if not args.slides:
            cases.append((write_photograph(work), BUILT_IN, EncodeSettings(patch_px=32, tissue="none")))
        for path, encoder_name, settings in cases:
            row = bench_slide(path, encoder_name, settings, work / "out.safetensors", args.rounds)
            append_row(args.csv, row)
            numbers = f"{row['num_patches']:9,}{row['seconds']:8.2f}{row['patches_per_second']:11.1f}"
            shares = "".join(f"{row[f'{stage}_share']:10.1%}" for stage in STAGES)
            print(f"{encoder_name:20}{path.name:28}{numbers}{shares}", flush=True)


def bench_slide(path: Path, encoder_name: str, settings: EncodeSettings, out: Path, rounds: int) -> dict:
    """The row of one slide and encoder."""
    encoder = load_encoder(encoder_name, "cpu")
    settings = settings.resolved(encoder)
    encode_slide(path, out, encoder, settings)
    walls, results = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        results.append(encode_slide(path, out, encoder, settings))
        walls.append(time.perf_counter() - began)
    seconds, num_patches = statistics.median(walls), results[0].num_patches
    busy = {stage: statistics.median(result.seconds[stage] for result in results) for stage in STAGES}
    shares = [round(busy[stage] / sum(busy.values()), 4) for stage in STAGES]
    values = (
        path.name, encoder.id, settings.patch_px, settings.step_px, num_patches, rounds,
        round(seconds, 4), round(num_patches / seconds, 1), *shares,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


if __name__ == "__main__":
    main()
