"""What every GPU generation makes of the kernels, without a GPU: `python -m bench.kernels.compile_table`.

One row for each architecture, d, h, dtype and K: registers, spills, shared memory, programs for each multiprocessor.
Triton's version is the one that Python finds: another one is laid before it by PYTHONPATH
(`pip install --no-deps --target DIR triton==3.8.0`).
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
import triton

from bench.common.record import RESULTS, append_row, check_header
from bench.kernels.compiled import SHARED_KIB, Compiled, compile_fused, compile_score, compile_select
from vllm_wsi.kernels.launch_table import score_config
from vllm_wsi.kernels.reference import K_BUCKETS

CSV = RESULTS / "compiled.csv"
COLUMNS = [
    "triton", "arch", "kernel", "feature_dim", "hidden_size", "dtype", "k", "block_m", "block_k", "num_warps",
    "num_stages", "registers", "spills", "shared_bytes", "blocks_per_sm", "tensor_op", "instructions",
]  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def write(csv: Path, arch: int, shape: dict[str, object], compiled: Compiled) -> None:
    row = dict.fromkeys(COLUMNS, "") | shape | {
        "triton": triton.__version__, "arch": f"sm_{arch}", "registers": compiled.registers, "spills": compiled.spills,
        "shared_bytes": compiled.shared_bytes, "blocks_per_sm": compiled.blocks_per_sm(arch),
        "tensor_op": compiled.tensor_op, "instructions": compiled.instructions, "num_warps": compiled.num_warps,
    }  # fmt: skip
    append_row(csv, row)
    print(*row.values(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(SHARED_KIB))
    parser.add_argument("--feature-dim", type=int, nargs="+", default=[512, 1536])
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[0, 64, 128, 256, 512])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--csv", type=Path, default=CSV, help="append the rows to this file")
    args = parser.parse_args()
    check_header(args.csv, COLUMNS)
    for arch in args.arch:
        for k in K_BUCKETS:
            write(args.csv, arch, {"kernel": "select", "feature_dim": 1536, "k": k}, compile_select(arch, k))
        for d, h, dtype in itertools.product(args.feature_dim, args.hidden_size, args.dtype):
            tile = score_config(arch, d, h, DTYPES[dtype])
            shape: dict[str, object] = {"feature_dim": d, "hidden_size": h, "dtype": dtype} | tile._asdict()
            write(args.csv, arch, shape | {"kernel": "score"}, compile_score(arch, d, h, DTYPES[dtype], tile))
            if h <= 256:
                compiled = compile_fused(arch, d, h, DTYPES[dtype], tile)
                write(args.csv, arch, shape | {"kernel": "score and select", "k": K_BUCKETS[0]}, compiled)


if __name__ == "__main__":
    main()
