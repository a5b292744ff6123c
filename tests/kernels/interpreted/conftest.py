"""Kernel tests run on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported: `tests/kernels/test_interpreted.py` runs this folder in a
process of its own with TRITON_INTERPRET=1; on a GPU machine `pytest tests/kernels/interpreted` runs it as it is.

There `tl.dot` is made exact to its contract, and splits fp32 as the tensor cores' `tf32x3` does. The interpreter's own
goes through `np.matmul`, that is through a BLAS, which may give a row other bits at another place of a tile (OpenBLAS
does without AVX-512), and multiplies bfloat16 as raw bits.

Two things are made faster there, which took five of six parts of the time. The exclusive or of a row, of which
`tl.sort` consists, is numpy's instead of a loop over the elements. And the interpreter puts its functions into
`triton.language` once, not at each call of a function of a kernel.
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


def dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
    """Column by column: every element sees the same products and sums in the same order, wherever it stands."""
    x, y = as_float32(a), as_float32(b)
    parts = [(x, y)]
    if input_precision == ir.INPUT_PRECISION.TF32x3:
        (x_big, x_small), (y_big, y_small) = tf32_parts(x), tf32_parts(y)
        parts = [(x_small, y_big), (x_big, y_small), (x_big, y_big)]
    total = np.zeros(accumulator.data.shape, np.float32)
    for one, other in parts:
        for k in range(one.shape[1]):
            total += one[:, k : k + 1] * other[k]
    return TensorHandle(accumulator.data + total, accumulator.dtype.scalar)


def tf32_parts(x):
    """x as a sum of two numbers of ten bits behind the leading one each, rounded to nearest as cvt.rna does."""

    def rounded(x):
        bits = x.view(np.uint32)
        return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

    big = rounded(np.ascontiguousarray(x))
    return big, rounded(x - big)


def reduce_by_numpy(self, input):
    if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
        return ELEMENT_BY_ELEMENT(self, input)
    data = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
    return [self.to_tensor(data, input[0].dtype)]


def as_float32(handle):
    if handle.dtype.scalar == tl.bfloat16:  # held as raw bits
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


if INTERPRETED:
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    class BothLanguages:
        """As a function that sees them."""

        __globals__ = {"tl": tl, "core": tl.core}

    InterpreterBuilder.create_dot = dot
    ELEMENT_BY_ELEMENT, ReduceOps.generic_reduce = ReduceOps.generic_reduce, reduce_by_numpy
    interpreter._patch_lang(BothLanguages)
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def pytest_generate_tests(metafunc):
    """`dtype`: all that the kernels take."""
    if "dtype" in metafunc.fixturenames:
        names = ["bfloat16", "float16", "float32"]
        metafunc.parametrize("dtype", [getattr(torch, name) for name in names], ids=names)
