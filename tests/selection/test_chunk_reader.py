"""ChunkReader: every row once, in order, in chunks of a size that follows from the row's."""

import numpy as np
import pytest
import torch

from vllm_wsi.selection.chunk_reader import CPU_CHUNK_BYTES, ChunkReader
from vllm_wsi.slides import features_in_memory


def stage(array, chunk_rows=None, dtype=None):
    """[(first row, copy of the chunk)]: on the CPU a chunk lives until the next one."""
    reader = ChunkReader(features_in_memory(array, dtype=dtype), chunk_rows=chunk_rows)
    return [(start, chunk.clone()) for start, chunk in reader.chunks()]


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


def test_for_a_gpu_a_chunk_lives_until_the_one_after_the_next():
    x = np.arange(12, dtype=np.float32).reshape(12, 1)
    chunks = ChunkReader(features_in_memory(x), for_gpu=True, chunk_rows=3).chunks()
    first, second = next(chunks)[1], next(chunks)[1]
    assert first[:, 0].tolist() == [0, 1, 2]
    assert second[:, 0].tolist() == [3, 4, 5]
    next(chunks)
    assert second[:, 0].tolist() == [3, 4, 5]


def test_reading_time_is_told():
    reader = ChunkReader(features_in_memory(np.ones((10, 3), np.float32)))
    assert reader.read_seconds == 0
    list(reader.chunks())
    assert reader.read_seconds > 0
