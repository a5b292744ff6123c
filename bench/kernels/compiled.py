"""Compiles our kernels for GPUs that are not there, and reads what became of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_wsi.kernels.fused import _score_topk_kernel
from vllm_wsi.kernels.launch_table import SELECT_BLOCK, SELECT_WARPS, LaunchConfig, precision, top_k_sizes
from vllm_wsi.kernels.score import _score_kernel
from vllm_wsi.kernels.select import _select_kernel
from vllm_wsi.kernels.vectors import _vectors_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one program may take, by architecture."""
TOP_K_SIGNATURE = {
    "cu_seqlens_ptr": "*i32", "n": "i32", "first_row": "i32", "k": "i32", "by_score": "i32",
    "running_keys_ptr": "*i64", "running_indices_ptr": "*i64", "workspace_ptr": "*i64", "tickets_ptr": "*i32",
    "indices_ptr": "*i64", "values_ptr": "*fp32", "keys_ptr": "*i64",
}  # fmt: skip
SCORE_SIGNATURE = {
    "x_stride": "i64", "column_sum_ptr": "*fp32", "bias_ptr": "*fp32", "out_weight_ptr": "*fp32",
    "out_bias_ptr": "*fp32", "eps": "fp32", "scores_ptr": "*fp32", "n": "i32",
}  # fmt: skip


class Compiled(NamedTuple):
    """What ptxas made of a kernel."""

    registers: int
    spills: int  # instructions that move registers to and from local memory
    tensor_op: str  # HGMMA, HMMA, UTCHMMA or ""
    shared_bytes: int
    instructions: int
    num_warps: int

    def blocks_per_sm(self, arch: int) -> int:
        """Programs that run at once on a multiprocessor, by registers, shared memory and threads."""
        allocated = -(-self.registers // 8) * 8 * 32 * self.num_warps
        shared = SHARED_KIB[arch] * 1024 // (self.shared_bytes + 1024)
        threads = (1536 if arch in (86, 89, 120) else 2048) // (32 * self.num_warps)
        return min(65536 // allocated, shared, threads)


def compile_kernel(kernel: Any, arch: int, signature: dict, constants: dict, config: LaunchConfig) -> Compiled:
    """Ahead of time, for sm_<arch>, with pointers and strides that are divisible by 16."""
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name.endswith("_stride")]
    source = ASTSource(
        kernel, types, {(names.index(name),): value for name, value in constants.items() if name in names},
        {(i,): [["tt.divisibility", 16]] for i in aligned if types[names[i]] != "constexpr"},
    )  # fmt: skip
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=config.options())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    tensor_op = next((op for op in ("HGMMA", "UTCHMMA", "HMMA") if re.search(rf"\b{op}\b", sass)), "")
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return Compiled(
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        tensor_op=tensor_op,
        shared_bytes=binary.metadata.shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", sass, re.MULTILINE)),
        num_warps=config.num_warps,
    )


def compile_score(arch: int, d: int, h: int, dtype: torch.dtype, config: LaunchConfig) -> Compiled:
    """The kernel that scores, for features [N, d] and a hidden layer of h, 0 for none."""
    return compile_kernel(_score_kernel, arch, _features(dtype, h), _tile_sizes(d, h, dtype, config), config)


def compile_vectors(arch: int, d: int, h: int, rank: int, dtype: torch.dtype, config: LaunchConfig) -> Compiled:
    """The kernel that makes R numbers of each patch."""
    constants = _tile_sizes(d, h, dtype, config) | {"R": rank}
    signature = _features(dtype, h) | {"vectors_ptr": "*fp32"}
    return compile_kernel(_vectors_kernel, arch, signature, constants, config)


def compile_select(arch: int, k: int, *, ragged: bool = False) -> Compiled:
    """The kernel that selects among given scores and gathers rows of d = 1536."""
    signature = TOP_K_SIGNATURE | {
        "scores_ptr": "*fp32", "features_ptr": "*bf16", "features_stride": "i64", "running_rows_ptr": "*bf16",
        "rows_ptr": "*bf16",
    }  # fmt: skip
    constants = {"column_stride": 1} | top_k_sizes(k, 1536, SELECT_BLOCK) | _one_slide(ragged)
    return compile_kernel(_select_kernel, arch, signature, constants, LaunchConfig(0, 0, SELECT_WARPS, 1))


# Many parameters: what the static table is keyed by.
def compile_fused(
    arch: int, d: int, h: int, dtype: torch.dtype, config: LaunchConfig, k: int = 32, ragged: bool = False
) -> Compiled:
    """The kernel that scores and selects in one launch."""
    pointer = POINTERS[dtype]
    signature = TOP_K_SIGNATURE | _features(dtype, h) | {"running_rows_ptr": pointer, "rows_ptr": pointer}
    constants = _tile_sizes(d, h, dtype, config) | top_k_sizes(k, d, SELECT_BLOCK, h) | _one_slide(ragged)
    return compile_kernel(_score_topk_kernel, arch, signature, constants, config)


def _features(dtype: torch.dtype, h: int) -> dict[str, str]:
    return SCORE_SIGNATURE | {"x_ptr": POINTERS[dtype], "weight_ptr": POINTERS[dtype] if h else "*fp32"}


def _tile_sizes(d: int, h: int, dtype: torch.dtype, config: LaunchConfig) -> dict[str, Any]:
    padded = max(16, 1 << (h - 1).bit_length()) if h else 0
    sizes = {"D": d, "H": padded, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
    return sizes | {"PRECISION": precision(dtype, h)}


def _one_slide(ragged: bool) -> dict[str, None]:
    return {} if ragged else {"cu_seqlens_ptr": None}
