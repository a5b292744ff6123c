"""What a stored selection depends on: equal digests mean equal bits."""

from __future__ import annotations

import hashlib
import platform
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_wsi.slides import SlideIdentity

from .stored_file import FORMAT

CODE = ("vllm_wsi.kernels", "vllm_wsi.selection", "vllm_wsi.slides")


class SelectionKey(NamedTuple):
    """One state of one slide, read by one scorer on one kind of device."""

    identity: SlideIdentity
    encoder: str | None  # which features, where a file holds several
    scorer: str  # digest of its weights, and the rule for encoders
    scored_on: str  # a device's name, as `Selection.scored_on` has it

    def of_selection(self, k: int, question: str | None = None) -> str:
        """Digest of the k best; `question`: of a question's query, where one is asked."""
        return self._digest("selection", k, question)

    def of_scores(self) -> str:
        """Digest of the scores of all patches (of a `QuestionScorer`, their vectors), from which the best of every k
        and question follow."""
        return self._digest("scores")

    def _digest(self, *what: object) -> str:
        scored_on = cpu_name() if self.scored_on == "cpu" else self.scored_on
        parts = (FORMAT, code_digest(), *what, tuple(self.identity), self.encoder, self.scorer, scored_on)
        return hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


@cache
def cpu_name() -> str:
    """Machine, vendor, instruction set and PyTorch, by which its libraries choose how they sum."""
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", _cpu_info(), re.MULTILINE)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"cpu, {platform.machine()}, {vendor and vendor[1]}, {capability}, PyTorch {torch.__version__}"


@cache
def code_digest() -> str:
    """Of the code that reads, scores and selects: what another version of it made is not found any more."""
    digest = hashlib.blake2b(digest_size=16)
    for package in CODE:
        for path in sorted(Path(import_module(package).__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
