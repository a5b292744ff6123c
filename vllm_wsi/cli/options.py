"""Options that several commands have, and how all of them are declared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from vllm_wsi.executors import Executor

# The help texts say themselves what is taken where an option is not given.
option = partial(typer.Option, show_default=False)
argument = partial(typer.Argument, show_default=False)

DEVICE_HELP = "auto (default), cpu, cuda or cuda:N"
Encoder = Annotated[str | None, option("--encoder", help="which features, where a file holds several")]
Mismatch = Literal["refuse", "allow"]
MISMATCH_HELP = "features of another encoder than the checkpoint's (default refuse)"
RAY_HELP = (
    "on the nodes of a Ray cluster instead, which see the same files: HOST:PORT of its head, or auto, the one of which "
    "this machine is a node (extra: ray)"
)
Ray = Annotated[str | None, option("--ray", metavar="ADDRESS", help=RAY_HELP)]
TissueDir = Annotated[
    Path | None, option("--tissue-dir", metavar="DIR", help="the folder of the labelled tissue (docs/tissue.md)")
]
EncoderMismatch = Annotated[Mismatch, option("--encoder-mismatch", help=MISMATCH_HELP)]


def hide_transformers_progress() -> None:
    """Its bars are of milliseconds here."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@contextmanager
def chosen_executor(ray: str | None, workers: int | None, shared: Path | None = None) -> Iterator[Executor]:
    """The cluster that `--ray` names, or this machine.

    Args:
        shared: folder into which all workers write.

    Raises:
        SettingsError, SetupError: there is no such cluster, or no Ray.
    """
    if ray is None:
        from vllm_wsi.executors import LocalExecutor

        yield LocalExecutor(workers)
        return
    from vllm_wsi.executors.ray_executor import ray_executor

    with ray_executor(ray, workers, shared) as executor:
        yield executor
