"""What one launch should take on an H100, by arithmetic: `bench.kernels.expected_time` writes docs/kernels.md.

Nothing here is measured. For each shape it sums bytes, products and instructions, divides by what the card can do, and
names the bound, so that the first card proves or refutes it. Beside it: what each architecture makes of the kernel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from bench.common.record import ROOT
from bench.common.tables import read_rows, table, write_tables
from vllm_wsi.kernels.launch_table import Card, fused_config
from vllm_wsi.selection.scorer import seeded_scorer

PAGE = ROOT / "docs" / "kernels.md"
COMPILED = ROOT / "bench" / "results" / "compiled.csv"
H100 = Card(arch=90, multiprocessors=132)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Of an H100 SXM: the data sheet's peaks, and of each what well-written kernels are known to reach.
MEMORY = 0.9 * 3.35e12  # bytes a second
L2 = 5.5e12  # bytes a second from L2 to the multiprocessors
PRODUCTS = {"bf16": 0.7 * 989e12, "fp32": 0.7 * 494e12 / 3}  # a second; fp32 is three products of TF32 parts
ISSUE = 132 * 4 * 32 * 1.755e9  # instructions of single threads a second: 4 schedulers, 32 lanes

STATISTICS = 4.7  # instructions for each element of X, in the loop (counted in the machine code)
EPILOGUE = 24.0  # for each hidden unit of a row: 18.3 of the GELU, the rest scales, adds and sums
LAUNCH = 3.0  # microseconds
MERGE = 1.0  # microseconds for 1,024 keys that one program merges
ARRIVE = 1.0  # microseconds for a counter, and for what others stored to be seen


class Expected(NamedTuple):
    """Microseconds."""

    memory: float
    l2: float
    products: float
    loop: float  # instructions beside the products
    epilogue: float
    tail: float  # launch, waves that are not full, and the merges of the last programs
    total: float
    copy: float  # of as many bytes as X has, half of them read and half written

    def bound(self) -> str:
        names = {"memory": "memory", "l2": "L2", "products": "products", "loop": "loop", "epilogue": "epilogue"}
        return names[max(names, key=lambda name: getattr(self, name))]


def expected(n: int, d: int, h: int, dtype: str) -> Expected:
    """One slide of n patches, K = 32, by the launch configuration of the table."""
    weights = seeded_scorer("patch", d, h, seed=0).requires_grad_(False).weights()
    config = fused_config(H100, weights, DTYPES[dtype], 32)
    assert config is not None
    size = 2 if dtype == "bf16" else 4
    tiles = math.ceil(n / config.tile.block_m)
    programs = min(tiles, config.programs)
    waves = math.ceil(tiles / programs) / (tiles / programs)  # the longest program over the mean one
    x_bytes = n * d * size
    memory = x_bytes / MEMORY
    l2 = (x_bytes + tiles * d * h * size) / L2
    products = 2 * n * d * h / PRODUCTS[dtype]
    loop, epilogue = n * d * STATISTICS / ISSUE, n * max(h, 1) * EPILOGUE / ISSUE
    overlapped = config.programs > H100.multiprocessors  # another program's loop runs beside an epilogue
    body = max(memory, l2, products, loop)
    body = max(body, loop + epilogue) if overlapped else body + epilogue
    in_block = 1024 // 32
    levels = [programs] if programs <= in_block else [in_block, math.ceil(programs / in_block)]
    tail = LAUNCH + sum(ARRIVE + MERGE * math.ceil(parts / in_block) for parts in levels)
    tail += 1e6 * body * (waves - 1)
    memory, l2, products, loop, epilogue = (1e6 * one for one in (memory, l2, products, loop, epilogue))
    return Expected(memory, l2, products, loop, epilogue, tail, 1e6 * body + tail, copy=memory)


def main() -> None:
    write_tables(PAGE, {"kernels:expected": expected_table(), "kernels:compiled": compiled_table()})


def expected_table() -> str:
    lines = []
    for n, d, h, dtype in [
        *((100_000, 512, h, "bf16") for h in (0, 64, 128, 256)),
        *((100_000, 1536, h, "bf16") for h in (128, 256)),
        *((n, 512, 128, "bf16") for n in (4_000, 16_000, 1_000_000)),
        *((100_000, 512, h, "fp32") for h in (128, 256)),
    ]:  # fmt: skip
        found = expected(n, d, h, dtype)
        parts = [f"{one:.0f}" for one in found[:6]]
        lines.append(
            [
                f"{n:,} x {d}",
                str(h),
                dtype,
                *parts,
                f"{found.total:.0f}",
                f"{found.total / found.copy:.2f}",
                found.bound(),
            ]
        )
    names = [
        "X",
        "h",
        "dtype",
        "memory",
        "L2",
        "products",
        "loop",
        "epilogue",
        "tail",
        "total us",
        "over a copy",
        "bound",
    ]
    return table(names, lines)


def compiled_table() -> str:
    """The newest rows of each architecture and version of Triton, for d = 1536."""
    rows = [row for row in read_rows(COMPILED) if row["kernel"] == "score and select" and row["feature_dim"] == "1536"]
    versions = sorted({row["triton"] for row in rows})
    cells = {(row["arch"], row["hidden_size"], row["dtype"], row["triton"]): row for row in rows}
    lines = []
    for arch, h, dtype in dict.fromkeys((row["arch"], row["hidden_size"], row["dtype"]) for row in rows):
        line = [arch, h, dtype]
        for version in versions:
            row = cells.get((arch, h, dtype, version))
            line.append("-" if row is None else f"{row['registers']} / {row['spills']} / {row['blocks_per_sm']}")
        lines.append(line)
    return table(["architecture", "h", "dtype", *(f"Triton {version}" for version in versions)], lines)


if __name__ == "__main__":
    main()
