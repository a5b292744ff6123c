"""How a training run's batches are loaded: by how many processes, and in which epoch."""

from __future__ import annotations

import os
import shutil
from typing import Any, Protocol

import torch
from transformers import TrainerCallback

MAX_WORKERS = 8  # for each training process: each of them holds some batches
LEAST_SHARED_MEMORY = 1 << 30  # bytes; batches come from the workers through it


def num_workers(asked: int | None) -> int:
    """Processes that read slides for one training process.

    Args:
        asked: None: this process's share of the cores, at most `MAX_WORKERS`; 0 where there is no GPU, as the steps
            themselves need the cores, and where the machine has little shared memory, as in a container without
            `--shm-size`.
    """
    if asked is not None:
        return asked
    if not torch.cuda.is_available():
        return 0
    if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free < LEAST_SHARED_MEMORY:
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun on this machine
    return min(MAX_WORKERS, max(1, (os.cpu_count() or 1) // processes))


class EpochDataset(Protocol):
    """Items that are others in each epoch."""

    def set_epoch(self, epoch: int) -> None: ...


class EpochCallback(TrainerCallback):
    """Tells the dataset which epoch begins, before anything of it is read.

    accelerate's loader does that only in one process and without a resume: elsewhere it tells the sampler alone.
    """

    def __init__(self, dataset: EpochDataset) -> None:
        self._dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._dataset.set_epoch(int(state.epoch or 0))
