"""Where slides are scored: the CPU, or a GPU that has shown on itself that it scores and selects right."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch

from vllm_wsi.errors import SettingsError, SetupError
from vllm_wsi.kernels import ScorerWeights, score_topk
from vllm_wsi.kernels.self_check import check_device, check_vectors

from .chunk_reader import CUDA_CHUNK_BYTES
from .question_scorer import QuestionScorer
from .scorer import FrozenScorer

GPU_THREADS = 2
"""Chunks that one GPU holds at once, whatever the number of slides that are read."""
NEEDED_BYTES = GPU_THREADS * 3 * CUDA_CHUNK_BYTES + (256 << 20)
"""Free memory that a GPU must have: the chunks, their scores and a margin."""
TIMED_ROWS = 32_768
CUDA_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Place(Protocol):
    """What scores one chunk after another."""

    device: torch.device
    name: str  # also of the bits that it gives: equal names give equal scores

    def run(self, work: Callable[..., T], *args: Any) -> Future[T]:
        """Does the work; its tensors are ready when the future is."""
        ...


class Cpu:
    """Works at once, in the caller's thread."""

    device = torch.device("cpu")
    name = "cpu"

    def run(self, work: Callable[..., T], *args: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(work(*args))
        return done


class Gpu:
    """Works on `GPU_THREADS` threads, each with a stream of its own, so that few chunks are on the GPU at a time, while
    many slides are read. PyTorch keeps freed memory for each stream, so these threads take theirs once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.name = device, gpu_name(device)
        self._threads = ThreadPoolExecutor(GPU_THREADS, f"wsi-{device.type}")
        self._own = threading.local()

    def run(self, work: Callable[..., T], *args: Any) -> Future[T]:
        return self._threads.submit(self._on_stream, work, *args)

    def _on_stream(self, work: Callable[..., T], *args: Any) -> T:
        if self.device.type != "cuda":
            return work(*args)
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._own.stream):
            done = work(*args)
            self._own.stream.synchronize()
        return done


class ScoringDevice:
    """Chooses the place once, at the first `start`, and leaves a GPU that fails.

    Args:
        wanted: "cpu", "cuda", "cuda:N", or "auto": a GPU where there is one that is fit, else the CPU.

    Raises:
        SettingsError: another word.
        SetupError: a GPU that is not there.
    """

    def __init__(self, wanted: str) -> None:
        kind, colon, index = wanted.partition(":")
        if kind not in ("cpu", "cuda", "auto") or (colon and not (kind == "cuda" and index.isdecimal())):
            raise SettingsError(f"device: found {wanted!r}, wanted 'cpu', 'cuda', 'cuda:N' or 'auto'")
        found = num_gpus()
        if kind == "cuda" and found <= int(index or 0):
            has = f"{found} CUDA devices" if found else "no CUDA device"
            raise SetupError(f"device: found {wanted!r}, wanted 'cpu' or 'auto': PyTorch finds {has} here")
        self.wanted = wanted
        self.told = ""  # what was chosen, in one line
        self._lock = threading.Lock()
        self._place: Place | None = None

    def start(self, scorer: FrozenScorer, sizes: Sequence[int], rank: int = 0) -> Place:
        """The place where slides are scored now. The first call chooses it, and may compile for a minute.

        Args:
            scorer: on the CPU.
            sizes: the K of selections.
            rank: of this process among those that share the GPUs of a machine; "auto" and "cuda" take its GPU.

        Raises:
            SetupError: a GPU that was asked for by name is not fit.
        """
        with self._lock:
            if self._place is None:
                self._place = self._chosen(scorer, sizes, rank)
            return self._place

    def failed(self, place: Place, error: Exception) -> str:
        """Leaves a GPU for good, unless its memory alone was short. Returns the reason, in two words."""
        if _is_out_of_memory(error):
            logger.warning("%s: out of memory for a slide, which the CPU scores instead (%s)", place.name, error)
            return "out of memory"
        with self._lock:
            if self._place is place:
                self._place, self.told = Cpu(), "slides are scored on the CPU"
                logger.error(
                    "%s: failed (%s: %s); from now on slides are scored on the CPU",
                    place.name, type(error).__name__, error,
                )  # fmt: skip
        return "device failed"

    def _chosen(self, scorer: FrozenScorer, sizes: Sequence[int], rank: int) -> Place:
        kind, _, index = self.wanted.partition(":")
        count = num_gpus()
        if kind == "cpu" or not count:
            self.told = "slides are scored on the CPU"
            if kind != "cpu":
                self.told += ": PyTorch finds no CUDA device"
            return Cpu()
        device = gpu_device(int(index) if index else rank % count)
        try:
            gpu = Gpu(device)
            _check_memory(gpu)
            began = time.monotonic()
            if isinstance(scorer, ScorerWeights):
                for k in sizes:
                    check_device(scorer, k, device)
            elif isinstance(scorer, QuestionScorer):
                check_vectors(scorer.vector_weights(), device)
            checked = time.monotonic() - began
            told = _timed(gpu, scorer)
        except Exception as error:  # whatever it is, slides can be scored without a GPU
            reason = f"{type(error).__name__}: {error}"
            if kind == "cuda":
                wanted = "wanted a GPU that is fit to score slides"
                raise SetupError(f"device: found {self.wanted!r}, {wanted} ({reason})") from error
            logger.warning("%s is not fit to score slides, so the CPU does (%s)", device, reason)
            self.told = "slides are scored on the CPU"
            return Cpu()
        self.told = f"slides are scored on {gpu.name}: compiled and checked in {checked:.1f} s{told}"
        return gpu


_launching = threading.Lock()


def launching(place: Place) -> AbstractContextManager[object]:
    """Around the launches of a GPU's threads: what two of them need compiled is compiled once."""
    return nullcontext() if isinstance(place, Cpu) else _launching


def num_gpus() -> int:
    """Without starting CUDA: PyTorch counts devices through NVML."""
    return torch.cuda.device_count() if torch.backends.cuda.is_built() else 0


def gpu_device(index: int) -> torch.device:
    return torch.device("cuda", index)


def gpu_name(device: torch.device) -> str:
    """Device, architecture, versions of Triton and PyTorch: scores of equal names have equal bits."""
    if device.type != "cuda":
        return str(device)
    import triton

    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, sm_{found.major}{found.minor}, Triton {triton.__version__}, PyTorch {torch.__version__}"


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _is_out_of_memory(error: Exception) -> bool:
    """Of the GPU, or of the pinned memory that CUDA gives: neither harms the slides after this one."""
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY
    return isinstance(error, torch.cuda.OutOfMemoryError)


def _check_memory(gpu: Gpu) -> None:
    free = free_bytes(gpu.device)
    if free < NEEDED_BYTES:
        raise MemoryError(f"found {free >> 20} MiB free, wanted {NEEDED_BYTES >> 20} MiB")


def _timed(gpu: Gpu, scorer: FrozenScorer) -> str:
    """What the GPU is worth for this scorer, in words."""
    if not isinstance(scorer, ScorerWeights):
        return ""
    x = torch.randn(TIMED_ROWS, scorer.feature_dim).half()
    seconds = []
    for place, weights in ((gpu, scorer.to(gpu.device)), (Cpu(), scorer)):
        place.run(_score, x, weights, place.device).result()
        began = time.perf_counter()
        place.run(_score, x, weights, place.device).result()
        seconds.append(time.perf_counter() - began)
    return f"; {TIMED_ROWS} patches take it {1e3 * seconds[0]:.1f} ms, and the CPU {1e3 * seconds[1]:.1f} ms"


def _score(x: torch.Tensor, weights: ScorerWeights, device: torch.device) -> torch.Tensor:
    return score_topk(x.to(device), weights, 32).indices.cpu()
