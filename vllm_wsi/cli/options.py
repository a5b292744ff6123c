"""Options that several commands have, and how all of them are declared."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

# The help texts say themselves what is taken where an option is not given.
option = partial(typer.Option, show_default=False)
argument = partial(typer.Argument, show_default=False)

DEVICE_HELP = "auto (default), cpu, cuda or cuda:N"
Encoder = Annotated[str | None, option("--encoder", help="which features, where a file holds several")]
Mismatch = Literal["refuse", "allow"]
MISMATCH_HELP = "features of another encoder than the checkpoint's (default refuse)"
EncoderMismatch = Annotated[Mismatch, option("--encoder-mismatch", help=MISMATCH_HELP)]


def hide_transformers_progress() -> None:
    """Its bars are of milliseconds here."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
