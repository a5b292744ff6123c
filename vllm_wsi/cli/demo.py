"""`vllm-wsi demo`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from vllm_wsi.errors import SetupError

from .options import EncoderMismatch, hide_transformers_progress, option

OUT = Path("vllm-wsi-demo")
SLIDE_HELP = "feature file or slide image (default: real tissue, and 100,000 virtual patches)"
CHECKPOINT_HELP = "(default: those of the package; of a slide of another encoder than theirs, random weights)"
ENCODER_HELP = "of a slide image (default colour-texture)"


def demo(
    slide: Annotated[Path | None, option("--slide", metavar="FILE", help=SLIDE_HELP)] = None,
    question: Annotated[str | None, option("--question", metavar="TEXT")] = None,
    checkpoint: Annotated[Path | None, option("--checkpoint", metavar="DIR", help=CHECKPOINT_HELP)] = None,
    encoder: Annotated[str, option("--encoder", help=ENCODER_HELP)] = "colour-texture",
    encoder_mismatch: EncoderMismatch = "refuse",
    out: Annotated[Path, option("--out", metavar="DIR", help=f"(default {OUT})")] = OUT,
    view: Annotated[bool, option("--view", help="keep the server and its viewer until Ctrl-C")] = False,
) -> None:
    if find_spec("vllm") is None:
        raise SetupError('vllm: found no such package, wanted it: pip install "vllm-wsi[gpu]" or "vllm-wsi[cpu]"')
    hide_transformers_progress()
    from .demo_run import DemoOptions, run_demo

    run_demo(DemoOptions(slide, question, checkpoint, encoder, encoder_mismatch, out, view))
