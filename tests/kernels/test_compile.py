"""The kernels compile for GPUs that are not there: no register spills, and the tensor cores of each generation.

The whole table, by Triton version, is `bench/results/compiled.csv`.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from vllm_wsi.kernels.launch_table import Card, fused_config, score_config
from vllm_wsi.selection.scorer import seeded_scorer

pytestmark = pytest.mark.slow
# By its path: with the repository's root on sys.path, vLLM would take `triton_kernels/` for Triton's own.
SPEC = importlib.util.spec_from_file_location("compiled", Path(__file__).parents[2] / "bench/kernels/compiled.py")
compiled = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compiled)
TENSOR_OP = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.mark.parametrize(("arch", "h"), [(80, 128), (89, 256), (90, 0), (90, 128), (90, 512), (100, 128), (120, 256)])
def test_the_scoring_kernel_spills_no_register_and_uses_the_tensor_cores(arch, h):
    config = score_config(arch, 1536, h, torch.bfloat16)
    found = compiled.compile_score(arch, 1536, h, torch.bfloat16, config)
    assert found.spills == 0
    assert found.tensor_op == (TENSOR_OP[arch] if h else "")
    assert found.shared_bytes <= compiled.SHARED_KIB[arch] * 1024


@pytest.mark.parametrize(("arch", "h", "dtype"), [(80, 256, torch.bfloat16), (90, 256, torch.float32)])
def test_the_kernel_of_vectors_spills_no_register_and_uses_the_tensor_cores(arch, h, dtype):
    found = compiled.compile_vectors(arch, 512, h, 16, dtype, score_config(arch, 512, h, dtype))
    assert found.spills == 0
    assert found.tensor_op == TENSOR_OP[arch]


@pytest.mark.parametrize(("arch", "h", "dtype"), [(90, 128, torch.bfloat16), (100, 256, torch.float32)])
def test_the_one_launch_of_the_table_spills_no_register(arch, h, dtype):
    config = fused_config(Card(arch, 1), seeded_scorer("patch", 512, h, seed=0).weights(), dtype, 32)
    found = compiled.compile_fused(arch, 512, h, dtype, config.tile)
    assert found.spills == 0
    assert found.tensor_op == (TENSOR_OP[arch] if dtype != torch.float32 else "HMMA")
    assert found.instructions > 1000  # Triton 3.7.1 made 16 of the tile that this card had before


def test_what_would_spill_takes_two_launches():
    for h, k in ((512, 32), (128, 33)):
        weights = seeded_scorer("patch", 512, h, seed=0).weights()
        assert fused_config(Card(90, 132), weights, torch.bfloat16, k) is None


@pytest.mark.parametrize(("arch", "k"), [(80, 32), (90, 256)])
def test_the_selecting_kernel_compiles_and_spills_next_to_nothing(arch, k):
    """A few registers that spill once for each program are accepted for the large K."""
    assert compiled.compile_select(arch, k, ragged=True).spills <= (0 if k == 32 else 8)
