"""What runs on a node of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_wsi.errors import SetupError

from .executor import Work

PACKAGE = "vllm-wsi"


@dataclass(frozen=True)
class WorkerStart:
    """What a worker is told first."""

    do: Callable[[Any], Any]
    start: Callable[..., None] | None
    given: tuple[Any, ...]
    folder: str  # in which the command runs
    mark: Path | None  # a file that the command has just written
    version: str

    @classmethod
    def of(cls, work: Work[Any, Any], mark: Path | None) -> WorkerStart:
        """Of a work of this process."""
        return cls(work.do, work.start, work.given, os.getcwd(), mark, version(PACKAGE))


class RayWorker:
    """An actor: one process, which starts once and then does one item after another."""

    def node(self) -> str:
        """The id of its node; also the answer to whether it lives."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def start(self, told: WorkerStart) -> None:
        """Raises SetupError where this node is not set up as that of the command."""
        name = os.uname().nodename
        if (found := version(PACKAGE)) != told.version:
            raise SetupError(f"node {name}: {PACKAGE}: found {found}, wanted {told.version} of the command")
        try:
            os.chdir(told.folder)  # so that relative paths are those of the command
        except OSError:
            raise SetupError(f"node {name}: found no folder {told.folder}, wanted that of the command") from None
        if told.mark is not None and not told.mark.exists():
            raise SetupError(
                f"node {name}: {told.mark.parent}: found another folder than the command sees, wanted one that all "
                "nodes share"
            )
        if told.start is not None:
            told.start(*told.given)
        self._do = told.do

    def do(self, item: Any) -> Any:
        """What comes of an item."""
        return self._do(item)
