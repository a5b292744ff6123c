"""vLLM's V2 model runner, the one of GPUs, on a CPU: first on PYTHONPATH in the processes of `test_v2_runner.py`.

vLLM takes it where Triton works. Here Triton's interpreter stands in for a GPU's compiler, and its CPU backend says that
it is active.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

import triton.backends


class _Driver:
    @staticmethod
    def is_active():
        return True


class _Backend:
    compiler = None
    driver = _Driver


triton.backends.backends["cpu"] = _Backend
