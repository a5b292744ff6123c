"""Compiles our kernels for GPUs that are not there, and reads what became of them."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_wsi.kernels.score import ScoreConfig, _score_kernel, _score_linear_kernel
from vllm_wsi.kernels.select import BLOCK, GATHER_BLOCK, LOOKUP_BLOCK, SELECT_WARPS, _select_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


class Compiled(NamedTuple):
    """What ptxas made of a kernel."""

    registers: int
    spill_loads_and_stores: int  # instructions that move registers to and from local memory
    tensor_op: str  # HGMMA, HMMA, UTCHMMA or ""
    shared_bytes: int


def compile_kernel(kernel, arch: int, signature: dict[str, str], constants: dict, config: ScoreConfig) -> Compiled:
    """Ahead of time, for sm_<arch>, with pointers and sizes that are divisible by 16."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    aligned |= {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_stride")}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    tensor_op = next((op for op in ("HGMMA", "UTCHMMA", "HMMA") if re.search(rf"\b{op}\b", sass)), "")
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return Compiled(int(re.search(r"REG:(\d+)", usage)[1]), spills, tensor_op, binary.metadata.shared)


def compile_score(arch: int, d: int, h: int, dtype: torch.dtype, config: ScoreConfig) -> Compiled:
    signature = {
        "x_ptr": POINTERS[dtype], "x_stride": "i64", "weight_ptr": POINTERS[dtype] if h else "*fp32",
        "column_sum_ptr": "*fp32", "weight_sum_ptr": "*fp32", "bias_ptr": "*fp32", "out_weight_ptr": "*fp32",
        "out_bias_ptr": "*fp32", "scores_ptr": "*fp32", "n": "i32", "eps": "fp32",
    }  # fmt: skip
    constants = {"D": d, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k} | ({"H": h} if h else {})
    return compile_kernel(_score_kernel if h else _score_linear_kernel, arch, signature, constants, config)


def compile_select(arch: int, k: int, *, ragged: bool = False, streaming: bool = False) -> Compiled:
    signature = {
        "scores_ptr": "*fp32", "cu_seqlens_ptr": "*i32", "n": "i32", "first_row": "i32", "running_keys_ptr": "*i64",
        "running_rows_ptr": "*bf16", "running_indices_ptr": "*i64", "features_ptr": "*bf16", "features_stride": "i64",
        "workspace_ptr": "*i64", "tickets_ptr": "*i32", "indices_ptr": "*i64", "values_ptr": "*fp32",
        "rows_ptr": "*bf16", "keys_ptr": "*i64", "parts": "i32",
    }  # fmt: skip
    constants = {
        "column_stride": 1, "K": k, "K_PAD": k, "BLOCK": BLOCK, "D": 1536, "BLOCK_D": GATHER_BLOCK,
        "LOOKUP": min(k, LOOKUP_BLOCK), "BY_SCORE": False,
    }  # fmt: skip
    absent = ["cu_seqlens_ptr"] * (not ragged)
    absent += ["running_keys_ptr", "running_rows_ptr", "running_indices_ptr"] * (not streaming)
    return compile_kernel(
        _select_kernel, arch, signature, constants | dict.fromkeys(absent), ScoreConfig(0, 0, SELECT_WARPS, 1)
    )
