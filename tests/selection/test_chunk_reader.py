"""ChunkStager: every row once, in order, in chunks of a size that follows from the row's."""

import numpy as np
import pytest
import torch

from vllm_wsi.selection.chunk_reader import CPU_CHUNK_BYTES, ChunkStager
from vllm_wsi.slides import features_in_memory

CPU = torch.device("cpu")


def stage(array, chunk_rows=None, dtype=None):
    """[(first row, copy of the chunk)]: on the CPU a chunk lives until the next one."""
    stager = ChunkStager(features_in_memory(array, dtype=dtype), CPU, chunk_rows)
    return [(start, chunk.clone()) for start, chunk in stager.chunks()]


@pytest.mark.parametrize("chunk_rows", [1, 7, 10, 11, 1000, None])
def test_the_chunks_are_the_slide(chunk_rows):
    x = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
    chunks = stage(x, chunk_rows)
    assert [start for start, _ in chunks] == list(range(0, 10, chunk_rows or 10))
    assert np.array_equal(torch.cat([chunk for _, chunk in chunks]).numpy(), x)


def test_bfloat16_chunks_are_bfloat16():
    x = torch.randn(5, 4).bfloat16()
    ((_, chunk),) = stage(x.view(torch.uint16).numpy(), dtype="bfloat16")
    assert torch.equal(chunk, x)


@pytest.mark.parametrize(("d", "dtype"), [(512, "float16"), (1536, "float32"), (2560, "float64"), (8, "float16")])
def test_a_chunk_takes_few_megabytes_whatever_the_rows_are(d, dtype):
    x = np.zeros((20_000, d), dtype)
    sizes = [chunk.nbytes for _, chunk in stage(x)]
    assert max(sizes) <= max(CPU_CHUNK_BYTES, 1024 * d * x.itemsize)
    assert sum(sizes) == x.nbytes


def test_reading_time_is_told():
    stager = ChunkStager(features_in_memory(np.ones((10, 3), np.float32)), CPU)
    assert stager.read_seconds == 0
    list(stager.chunks())
    assert stager.read_seconds > 0
