"""Chunks of a feature file on the scoring device: on CUDA, reading and uploading run beside the scoring."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

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


class _ThreadStreams(threading.local):
    """One stream for each thread. PyTorch keeps freed memory for each stream, so a stream for each slide would use more
    and more memory."""

    def __init__(self) -> None:
        self._by_device: dict[torch.device, torch.cuda.Stream] = {}

    def on(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._by_device:
            self._by_device[device] = torch.cuda.Stream(device)
        return self._by_device[device]


_streams = _ThreadStreams()


class ChunkStager:
    """Yields a slide's chunks as tensors on the device, in order.

    On CUDA, two pinned buffers take turns: while one is uploaded and scored on this thread's own stream, the next
    chunk is read into the other, so that a slide takes about max(read, upload) once the kernels are faster. That is
    two chunks of pinned and two of device memory for each thread that reads slides; PyTorch keeps the latter for the
    thread's next slide. On the CPU there is one buffer, which the next chunk overwrites.

    Args:
        slide: an open feature file.
        device: where the chunks go.
        chunk_rows: rows of a chunk; None: 8 MiB on the CPU, 32 MiB on CUDA, in steps of 1024 rows.
    """

    def __init__(self, slide: FeatureFile, device: torch.device, chunk_rows: int | None = None) -> None:
        self._slide, self.device = slide, device
        self._cuda = device.type == "cuda"
        if chunk_rows is None:
            row_bytes = slide.feature_dim * slide.storage_dtype.itemsize
            size = CUDA_CHUNK_BYTES if self._cuda else CPU_CHUNK_BYTES
            chunk_rows = max(ROW_STEP, size // row_bytes // ROW_STEP * ROW_STEP)
        self._chunk_rows = min(chunk_rows, slide.num_patches)
        self._stream = _streams.on(device) if self._cuda else None
        self.read_seconds = 0.0

    def on_stream(self) -> AbstractContextManager:
        """Within it, work on the chunks is queued on the thread's stream."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def wait(self) -> None:
        """Returns when all that was queued is done."""
        if self._stream is not None:
            self._stream.synchronize()

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, [n, d] in the file's dtype); on the CPU valid until the next one."""
        slide, dtype = self._slide, getattr(torch, self._slide.dtype)
        shape = (self._chunk_rows, slide.feature_dim)
        buffers = [torch.empty(shape, dtype=dtype, pin_memory=self._cuda) for _ in range(2 if self._cuda else 1)]
        raw = [_storage(buffer) for buffer in buffers]
        uploaded: list[torch.cuda.Event | None] = [None] * len(buffers)
        for i, start in enumerate(range(0, slide.num_patches, self._chunk_rows)):
            turn = i % len(buffers)
            if (event := uploaded[turn]) is not None:
                event.synchronize()
            stop = min(start + self._chunk_rows, slide.num_patches)
            began = time.perf_counter()
            slide.read_rows(start, stop, raw[turn])
            self.read_seconds += time.perf_counter() - began
            chunk = buffers[turn][: stop - start]
            if self._stream is None:
                yield start, chunk
                continue
            with self.on_stream():
                chunk = chunk.to(self.device, non_blocking=True)
                uploaded[turn] = self._stream.record_event()
            yield start, chunk
