"""The kernels compile for GPUs that are not there: no register spills, and the tensor cores of each generation.

The whole table, by Triton version, is `bench/results/compiled.csv`.
"""

import pytest
import torch

from bench.kernels.compiled import SHARED_KIB, compile_score, compile_select
from vllm_wsi.kernels.launch_table import score_config

pytestmark = pytest.mark.slow
TENSOR_OP = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.mark.parametrize("h", [0, 128, 256, 512])
@pytest.mark.parametrize("arch", TENSOR_OP)
def test_the_scoring_kernel_spills_no_register_and_uses_the_tensor_cores(arch, h):
    config = score_config(arch, 1536, h, torch.bfloat16)
    compiled = compile_score(arch, 1536, h, torch.bfloat16, config)
    assert compiled.spills == 0
    # With h = 512 tcgen05 needs more registers than there are: sm_100 then works as sm_80 does.
    wanted = "" if h == 0 else "HMMA" if (arch, h) == (100, 512) else TENSOR_OP[arch]
    assert compiled.tensor_op == wanted
    assert compiled.shared_bytes <= SHARED_KIB[arch] * 1024


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_other_dtypes_compile_without_spills(dtype):
    for h in (0, 128, 256):
        assert compile_score(90, 512, h, dtype, score_config(90, 512, h, dtype)).spills == 0


@pytest.mark.parametrize(("arch", "k"), [(80, 32), (90, 32), (90, 256), (100, 32), (120, 32)])
def test_the_selecting_kernel_compiles_and_spills_next_to_nothing(arch, k):
    """A few registers that spill once for each program are accepted for the large K."""
    assert compile_select(arch, k, ragged=True).spills <= (0 if k == 32 else 8)
