"""`vllm-wsi`: the commands, and what becomes of their errors.

Neither this module nor the commands' import torch, transformers, NumPy or vLLM before a command runs: `--help` and
errors of usage answer at once. A command has a parameter for each of its options.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from vllm_wsi import __version__
from vllm_wsi.errors import WsiError

from .assemble import assemble
from .calibrate import calibrate
from .compile import compile_kernels
from .convert import convert
from .demo import demo
from .doctor import doctor
from .encode import encode
from .eval import evaluate
from .init_checkpoint import init_checkpoint
from .options import option
from .select import select
from .store import store
from .study import study
from .train import train
from .warm import warm

PROGRAM = "vllm-wsi"
USAGE = 2
"""Exit status where the command line itself is wrong."""

app = typer.Typer(
    name=PROGRAM,
    help="Slide language models on vLLM.",
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, command, text in (
    ("encode", encode, "slide images to feature files (extra: slides)"),
    ("convert", convert, "feature files of any format to safetensors, which are read fast (extra: slides)"),
    ("doctor", doctor, "what is in a feature file, and what is wrong with it"),
    ("select", select, "the patches that a checkpoint keeps of a slide, as JSON"),
    ("warm", warm, "selects slides ahead of time, into a selection store"),
    ("store", store, "what lies in a selection store; checks and prunes it"),
    ("demo", demo, "a slide, a real server, an answer and the patches behind it"),
    ("init-checkpoint", init_checkpoint, "write a small checkpoint with random weights"),
    ("train", train, "train a checkpoint (extra: train)"),
    ("calibrate", calibrate, "how far a checkpoint's scores and answers can be trusted (extras: train, eval)"),
    ("assemble", assemble, "trained parts and their decoder to a checkpoint that vllm serves"),
    ("compile", compile_kernels, "a checkpoint's kernels for a GPU that is not there, into Triton's cache"),
    ("study", study, "tables and figures: what a selection is worth (extra: study)"),
    ("eval", evaluate, "a benchmark's questions to any endpoint, scored (extra: eval)"),
):
    app.command(name, help=text, short_help=text)(command)


@dataclass
class Invocation:
    """What is known of a command line before its command runs."""

    command: str = ""
    debug: bool = False


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    version: Annotated[
        bool, option("--version", help="show the version and exit", is_eager=True, callback=_show_version)
    ] = False,
    debug: Annotated[bool, option("--debug", help="show the traceback of every error")] = False,
) -> None:
    context.obj.command, context.obj.debug = context.invoked_subcommand or "", debug


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status.

    What the user can mend is one line on stderr and status 1: a `WsiError`, or an `OSError` that names a file. Any
    other error is a fault of ours or of a library and goes on to the caller; with `--debug` every error does.

    Raises:
        SystemExit: with status 2, where the command line is wrong.
    """
    invocation = Invocation()
    with _logging_to_stderr():
        try:
            typer.main.get_command(app)(args=None if argv is None else list(argv), prog_name=PROGRAM, obj=invocation)
        except SystemExit as end:
            if end.code == USAGE:
                raise
            return int(end.code or 0)
        except (WsiError, OSError) as error:
            if invocation.debug or (isinstance(error, OSError) and error.filename is None):
                raise
            print(f"{PROGRAM} {invocation.command}: {error}", file=sys.stderr)
            return 1
    return 0


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Messages of this package, as they are, on what is stderr now."""
    logger, handler = logging.getLogger("vllm_wsi"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
