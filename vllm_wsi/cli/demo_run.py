"""`vllm-wsi demo`: slides, a real server, the official client, answers, the patches behind them, and stage times."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.model.checkpoint import read_config
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.slides.encoder_names import EncoderCheck, Mismatch, recorded_encoder

from .demo_answers import show
from .demo_slides import DemoSlide, Progress, slides_to_show

UNTRAINED = "random weights: the answer is noise, the path is real"
SERVER_ARGS = ("--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager")


@dataclass(frozen=True)
class DemoOptions:
    """What the demo is asked to show.

    Args:
        slide: feature file or slide image; None: a photograph of tissue and a virtual slide of 100,000 patches.
        question: instead of the demo's own.
        checkpoint: None: the trained demo checkpoint, or random weights for a slide of the user's.
        encoder: of a slide image.
        encoder_mismatch: of the slide; the demo's own photograph is allowed it with the demo checkpoint, and says so.
        out: directory for the pictures of the selection.
        view: the server goes on, with its viewer, until it is interrupted.
    """

    slide: Path | None
    question: str | None
    checkpoint: Path | None
    encoder: str
    encoder_mismatch: Mismatch
    out: Path
    view: bool


def run_demo(options: DemoOptions) -> None:
    """Runs the demo.

    Raises:
        SlideError, EncoderError, CheckpointError: of what was given, before a server is started.
        ServerError: the server did not start.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-demo-") as folder:
        work = Path(folder)
        shown = slides_to_show(options.slide, options.encoder, work)
        is_untrained = options.checkpoint is None and options.slide is not None
        checkpoint = options.checkpoint or DEMO_CHECKPOINT
        if is_untrained:
            checkpoint = _random_weights(work / "checkpoint", shown[0])
        wanted = read_config(str(checkpoint)).encoder
        for one in shown:
            _prepare(one, options, checkpoint, wanted)
            if is_untrained:
                one.note = UNTRAINED
        progress = Progress("starting vllm serve")
        args = [*SERVER_ARGS, *(("--dtype", "float32") if is_untrained else ())]
        if any(one.encoder_mismatch == "allow" for one in shown):
            args += ["--mm-processor-kwargs", json.dumps({"encoder_mismatch": "allow"})]
        media = shown[0].features.parent
        with VllmServer(checkpoint, media, work / "server.log", args, on_wait=progress.tick) as server:
            progress.done()
            for one in shown:
                show(server, one, checkpoint, options.out)
            if options.view:
                print(f"\nviewer     {server.root}/wsi/   (Ctrl-C ends it)", flush=True)
                _wait_for_interrupt(server)


def _random_weights(path: Path, slide: DemoSlide) -> Path:
    from vllm_wsi.model.init_checkpoint import init_checkpoint
    from vllm_wsi.model.tiny_settings import TinySettings

    progress = Progress("making a small checkpoint with random weights")
    encoder = recorded_encoder(slide.metadata)
    settings = TinySettings(feature_dim=slide.feature_dim, max_position_embeddings=131072, encoder=encoder)
    init_checkpoint(path, settings)
    progress.done()
    return path


def _prepare(slide: DemoSlide, options: DemoOptions, checkpoint: Path, wanted: str | None) -> None:
    """Sets questions, note and rule for encoders; raises EncoderError where the checkpoint's is another one."""
    is_photograph = options.slide is None and slide.image is not None
    on_purpose = is_photograph and checkpoint == DEMO_CHECKPOINT
    slide.encoder_mismatch = "allow" if on_purpose else options.encoder_mismatch
    EncoderCheck(wanted, slide.encoder_mismatch)(str(slide.features), slide.metadata)
    if checkpoint != DEMO_CHECKPOINT:
        slide.note = ""
    if options.question is not None:
        slide.questions = (options.question, options.question)


def _wait_for_interrupt(server: VllmServer) -> None:
    try:
        while server.is_alive:
            time.sleep(1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
