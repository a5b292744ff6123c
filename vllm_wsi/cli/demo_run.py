"""`vllm-wsi demo`: slides, a real server, the official client, answers, the patches behind them, and stage times."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vllm_wsi.errors import SetupError
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.model.checkpoint import read_config
from vllm_wsi.parts.fetch import cache_folder
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.slides.encoder_names import Mismatch, recorded_encoder
from vllm_wsi.store.store_settings import ENVIRONMENT

from .demo_answers import show
from .demo_slides import UNFAMILIAR, DemoSlide, Progress, Scene, photograph, users_slide, virtual_slide
from .demo_tissue import fits_tissue, on_a_closer_grid, tissue_scene, tissue_slides

UNTRAINED = "random weights: the answer is noise, the path is real"
VIRTUAL_MODEL = "the demo checkpoint, trained on virtual slides alone"
STORE_GIB = 1
SERVER_ARGS = ("--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager")


@dataclass(frozen=True)
class DemoOptions:
    """What the demo is asked to show.

    Args:
        slide: feature file or slide image; None: real tissue, and a virtual slide of 100,000 patches.
        question: instead of the demo's own.
        checkpoint: None: the package's own; for a slide of the user's of another encoder, random weights.
        encoder: of a slide image.
        encoder_mismatch: of the slide; the demo's own photograph is allowed it with the demo checkpoint, and says so.
        out: directory for the pictures of the selection.
        view: the last server goes on, with its viewer, until it is interrupted.
    """

    slide: Path | None
    question: str | None
    checkpoint: Path | None
    encoder: str
    encoder_mismatch: Mismatch
    out: Path
    view: bool


def run_demo(options: DemoOptions) -> None:
    """Runs the demo: one server for each checkpoint, one after the other.

    Raises:
        SlideError, EncoderError, CheckpointError: of what was given, before a server is started.
        SetupError: something that the user asked for cannot be fetched.
        ServerError: the server did not start.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-demo-") as folder:
        work = Path(folder)
        scenes = _scenes(options, work)
        for scene in scenes:
            _prepare(scene, options)
        for scene in scenes:
            _play(scene, work, options, is_last=scene is scenes[-1])


def _scenes(options: DemoOptions, work: Path) -> list[Scene]:
    if options.slide is None:
        if options.checkpoint is not None:
            return [Scene(options.checkpoint, options.checkpoint.name, [photograph(work), virtual_slide(work)])]
        scenes = _own_scenes(work)
        return scenes[::-1] if options.view else scenes  # the viewer is to show tissue
    slide = users_slide(options.slide, options.encoder, work)
    if options.checkpoint is not None:
        slide.note = UNFAMILIAR if slide.image is not None else ""
        return [Scene(options.checkpoint, options.checkpoint.name, [slide])]
    if fits_tissue(slide):
        return [tissue_scene([on_a_closer_grid(slide, work)])]
    slide.note = UNTRAINED
    checkpoint = _random_weights(work / "checkpoint", slide)
    return [Scene(checkpoint, "random weights", [slide], server_args=("--dtype", "float32"))]


def _own_scenes(work: Path) -> list[Scene]:
    """Real tissue and the virtual slide; a photograph takes the tissue's place where its parts cannot be fetched."""
    try:
        tissue = tissue_scene(tissue_slides(work))
    except SetupError as error:
        print(f"{error}\nthe demo goes on without a tissue model, with a photograph of tissue", file=sys.stderr)
        return [Scene(DEMO_CHECKPOINT, VIRTUAL_MODEL, [photograph(work), virtual_slide(work)])]
    return [tissue, Scene(DEMO_CHECKPOINT, VIRTUAL_MODEL, [virtual_slide(work)])]


def _play(scene: Scene, work: Path, options: DemoOptions, is_last: bool) -> None:
    """Starts a server, and asks it about the scene's slides."""
    options_of_slides: dict[str, object] = {}
    if not os.environ.get(ENVIRONMENT):
        options_of_slides |= {"selection_store": str(cache_folder() / "store"), "selection_store_gib": STORE_GIB}
    if any(one.encoder_mismatch == "allow" for one in scene.slides):
        options_of_slides["encoder_mismatch"] = "allow"
    args = [*SERVER_ARGS, *scene.server_args, "--mm-processor-kwargs", json.dumps(options_of_slides)]
    media = scene.slides[0].features.parent
    progress = Progress("starting vllm serve")
    with VllmServer(scene.checkpoint, media, work / "server.log", args, on_wait=progress.tick) as server:
        progress.done()
        print(f"\nmodel      {scene.model}", *scene.about, sep="\n           ")
        for one in scene.slides:
            show(server, one, scene.checkpoint, options.out)
        if options.view and is_last:
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


def _prepare(scene: Scene, options: DemoOptions) -> None:
    """Sets questions and rule for encoders; raises EncoderError where the checkpoint's is another one."""
    wanted = read_config(str(scene.checkpoint))
    for slide in scene.slides:
        on_purpose = options.slide is None and slide.image is not None and scene.checkpoint == DEMO_CHECKPOINT
        slide.encoder_mismatch = "allow" if on_purpose else options.encoder_mismatch
        wanted.encoder_check(slide.encoder_mismatch)(str(slide.features), slide.metadata)
        if options.checkpoint not in (None, DEMO_CHECKPOINT):
            slide.note = ""
        if options.question is not None:
            slide.questions = (options.question, options.question)


def _wait_for_interrupt(server: VllmServer) -> None:
    try:
        while server.is_alive:
            time.sleep(1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
