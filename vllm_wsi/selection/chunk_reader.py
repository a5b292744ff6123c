"""Chunks of a feature file in memory: for a GPU, the next one is read while one is uploaded and scored."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_wsi.slides import FeatureFile

CPU_CHUNK_BYTES = 8 << 20
CUDA_CHUNK_BYTES = 32 << 20
ROW_STEP = 1024


def read_tensor_rows(slide: FeatureFile, indices: Tensor | None = None) -> Tensor:
    """Chosen rows [k, d] of a feature file, in its dtype.

    Args:
        indices: int64 [k], distinct, in any order; None: all rows.
    """
    if indices is None:
        rows = slide.read_rows(0, slide.num_patches)
    else:
        order = indices.argsort()
        rows = slide.read_at(indices[order].numpy())[order.argsort().numpy()]
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if slide.dtype == "bfloat16" else tensor


def _storage(buffer: Tensor) -> NDArray:
    """The same memory as NumPy reads into it; NumPy has no bfloat16, so those go by their raw 16 bits."""
    return (buffer.view(torch.uint16) if buffer.dtype == torch.bfloat16 else buffer).numpy()


class ChunkReader:
    """Yields a slide's chunks in order, from buffers that are used again.

    For a GPU two pinned buffers take turns: while one is uploaded and scored, the next chunk is read into the other, so
    that a slide takes about max(read, upload) once the kernels are faster. On the CPU there is one buffer.

    Args:
        slide: an open feature file.
        for_gpu: whether the chunks go to a GPU.
        chunk_rows: rows of a chunk; None: 8 MiB on the CPU, 32 MiB for a GPU, in steps of 1024 rows.
    """

    def __init__(self, slide: FeatureFile, for_gpu: bool = False, chunk_rows: int | None = None) -> None:
        self.slide, self.num_patches, self._for_gpu = slide, slide.num_patches, for_gpu
        if chunk_rows is None:
            row_bytes = slide.feature_dim * slide.storage_dtype.itemsize
            size = CUDA_CHUNK_BYTES if for_gpu else CPU_CHUNK_BYTES
            chunk_rows = max(ROW_STEP, size // row_bytes // ROW_STEP * ROW_STEP)
        self._chunk_rows = min(chunk_rows, slide.num_patches)
        self.read_seconds = 0.0

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, [n, d] in the file's dtype). A chunk is valid until the next one is asked for; for a GPU, until
        the one after that."""
        slide, dtype = self.slide, getattr(torch, self.slide.dtype)
        shape = (self._chunk_rows, slide.feature_dim)
        pinned = self._for_gpu and torch.cuda.is_available()
        buffers = [torch.empty(shape, dtype=dtype, pin_memory=pinned) for _ in range(2 if self._for_gpu else 1)]
        raw = [_storage(buffer) for buffer in buffers]
        for i, start in enumerate(range(0, slide.num_patches, self._chunk_rows)):
            turn = i % len(buffers)
            stop = min(start + self._chunk_rows, slide.num_patches)
            began = time.perf_counter()
            slide.read_rows(start, stop, raw[turn])
            self.read_seconds += time.perf_counter() - began
            yield start, buffers[turn][: stop - start]
