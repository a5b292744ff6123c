"""What a stored selection depends on: equal digests mean equal bits."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from typing import NamedTuple

import torch

from vllm_wsi.slides import SlideIdentity

from .stored_file import FORMAT


class SelectionKey(NamedTuple):
    """One state of one slide, read by one scorer on one kind of device."""

    identity: SlideIdentity
    encoder: str | None  # which features, where a file holds several
    scorer: str  # digest of its weights, and the rule for encoders
    scored_on: str  # a device's name, as `Selection.scored_on` has it

    def of_selection(self, k: int) -> str:
        """Digest of the k best."""
        return self._digest("selection", k)

    def of_scores(self) -> str:
        """Digest of the scores of all patches, from which the best of every k follow."""
        return self._digest("scores")

    def _digest(self, *what: object) -> str:
        scored_on = cpu_name() if self.scored_on == "cpu" else self.scored_on
        parts = (FORMAT, *what, tuple(self.identity), self.encoder, self.scorer, scored_on)
        return hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


@cache
def cpu_name() -> str:
    """Machine, instruction set and PyTorch: two hosts whose sums may end in other bits have other names."""
    return f"cpu, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, PyTorch {torch.__version__}"
