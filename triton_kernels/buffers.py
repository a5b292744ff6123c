"""What the Top-K kernels read and write besides X: scratch, earlier chunks, outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .keys import ABSENT, MAX_ROW
from .reference import MAX_FAST_K, Running, Selected, padded_k

MAX_PARTS = 512
"""Programs that share a slide."""
MIN_GROUP = 16
"""Programs that merge what they kept among themselves first; more, where more parts fit a block."""
TICKETS = 1 + MAX_PARTS // MIN_GROUP
"""Counters of a slide: its own, and one for each group of programs."""


class Workspace:
    """Scratch of one stream; may be reused by any later call of the same or smaller size, also in a CUDA graph."""

    def __init__(self, device: torch.device | str, num_slides: int = 1) -> None:
        self.keys = torch.empty(num_slides * MAX_PARTS * MAX_FAST_K, dtype=torch.int64, device=device)
        self.tickets = torch.zeros((num_slides, TICKETS), dtype=torch.int32, device=device)
        self.nothing = torch.full((num_slides * MAX_FAST_K,), ABSENT, device=device)  # what no earlier chunk kept


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def stream_workspace(device: torch.device, num_slides: int) -> Workspace:
    """The current stream's own workspace, made once: calls of one stream run one after another.

    A CUDA graph under capture gets one of its own, which lives in the graph's memory as long as the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return Workspace(device, num_slides)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    found = _workspaces.get(key)
    if found is None or len(found.tickets) < num_slides:
        found = _workspaces[key] = Workspace(device, num_slides)
    return found


class TopKBuffers(NamedTuple):
    """The pointers of `best.merge_parts`, in its order."""

    running_keys: Tensor
    running_rows: Tensor | None  # read only where an index lies below the chunk's first row
    running_indices: Tensor
    workspace_keys: Tensor
    tickets: Tensor
    indices: Tensor
    values: Tensor
    rows: Tensor | None
    keys: Tensor

    def selected(self) -> Selected:
        return Selected(self.indices, self.values, self.rows, self.keys)


def make_buffers(
    like: Tensor,
    num_slides: int,
    k: int,
    features: Tensor | None,
    running: Running | Selected | None,
    workspace: Workspace | None,
) -> TopKBuffers:
    """Empty outputs for S slides of k patches each, and what the kernels need to fill them.

    Args:
        like: any tensor on the device.

    Raises:
        ValueError: k is above `MAX_FAST_K`.
    """
    if k > MAX_FAST_K:
        raise ValueError(f"k: found {k}, wanted at most {MAX_FAST_K}")
    workspace = workspace or Workspace(like.device, num_slides)
    indices = torch.empty((num_slides, k), dtype=torch.int64, device=like.device)
    values = torch.empty((num_slides, k), dtype=torch.float32, device=like.device)
    keys = torch.empty((num_slides, padded_k(k)), dtype=torch.int64, device=like.device)
    rows = None if features is None else features.new_empty((num_slides, k, features.shape[1]))
    before = (workspace.nothing, features, workspace.nothing)
    if running is not None:
        before = (running.keys, running.rows, running.indices)
    return TopKBuffers(*before, workspace.keys, workspace.tickets, indices, values, rows, keys)


def check_last_row(first_row: int, n: int) -> None:
    """Raises ValueError where the last of n rows fits no key."""
    if first_row + n - 1 > MAX_ROW:
        raise ValueError(f"row {first_row + n - 1} does not fit a key, wanted at most {MAX_ROW}")
