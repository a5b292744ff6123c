"""`vllm-wsi demo`: slides, a real server, the official client, answers, the patches behind them, and stage times."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_wsi.errors import SlideError
from vllm_wsi.haystack.checkpoint import DEMO_CHECKPOINT
from vllm_wsi.haystack.generator import HaystackSlide, HaystackWorld
from vllm_wsi.model.checkpoint import load_selector
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.rendering.overlay import SelectionOverlay
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.slides import SlideIdentity, open_features
from vllm_wsi.slides.encoder_names import EncoderCheck, Mismatch, recorded_encoder
from vllm_wsi.slides.formats.dispatch import is_image

VIRTUAL_PATCHES = 100_000
VIRTUAL_SLIDE = 0  # number of the slide in haystack's test split
ANSWER_TOKENS = 32
QUESTION = "What does this slide show?"
SECOND_QUESTION = "Which finding supports this?"
PHOTOGRAPH_MPP = 0.5  # it says none; this number only sets the scale of a demo
PHOTOGRAPH_PATCH_PX = 32
UNTRAINED = "random weights: the answer is noise, the path is real"
UNFAMILIAR = "trained on virtual slides alone: its answer about tissue means nothing, the path is real"


class Progress:
    """One line that lives while something takes long."""

    def __init__(self, what: str) -> None:
        self._what, self._began, self._live = what, time.monotonic(), sys.stderr.isatty()
        print(f"{what} ...", end="" if self._live else "\n", file=sys.stderr, flush=True)

    def tick(self, seconds: float) -> None:
        if self._live:
            print(f"\r{self._what} ... {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        start = f"\r{self._what} ... " if self._live else "  "
        print(f"{start}done in {time.monotonic() - self._began:.1f} s", file=sys.stderr, flush=True)


@dataclass
class DemoSlide:
    """A slide to ask about."""

    features: Path
    image: Path | None = None
    virtual: HaystackSlide | None = None  # whose right answers are known
    questions: tuple[str, str] = (QUESTION, SECOND_QUESTION)
    note: str = ""
    encoder_mismatch: Mismatch = "refuse"
    facts: str = field(init=False)
    feature_dim: int = field(init=False)
    metadata: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        with open_features(self.features) as opened:
            self.facts = f"{opened.num_patches:,} patches x {opened.feature_dim}, {opened.dtype}, {opened.format}"
            self.feature_dim, self.metadata = opened.feature_dim, opened.metadata


def run_demo(
    slide: Path | None,
    question: str | None,
    checkpoint: Path | None,
    encoder: str,
    out: Path,
    view: bool,
    encoder_mismatch: Mismatch = "refuse",
) -> int:
    """Runs the demo; returns the exit status.

    Args:
        slide: feature file or slide image; None: a photograph of tissue and a virtual slide of 100,000 patches.
        question: instead of the demo's own.
        checkpoint: None: the trained demo checkpoint, or random weights where it does not fit the slide.
        encoder: of a slide image.
        out: directory for the pictures of the selection.
        encoder_mismatch: of the slide; the demo's own photograph is allowed it with the demo checkpoint, and says so.
        view: the server goes on, with its viewer, until it is interrupted.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-demo-") as folder:
        work = Path(folder)
        if slide is None:
            photograph = _encoded(write_photograph(work), "colour-texture", work, PHOTOGRAPH_PATCH_PX, "none")
            shown = [photograph, _virtual_slide(work)]
        elif _is_image(slide):
            shown = [_encoded(slide.resolve(), encoder, work)]
        else:
            shown = [DemoSlide(slide.resolve())]
        if checkpoint is None and slide is None:
            checkpoint = DEMO_CHECKPOINT
        untrained = checkpoint is None
        if checkpoint is None:
            progress = Progress("making a small checkpoint with random weights")
            from vllm_wsi.model.init_checkpoint import init_checkpoint

            checkpoint = work / "checkpoint"
            encoder_name = recorded_encoder(shown[0].metadata)
            init_checkpoint(checkpoint, shown[0].feature_dim, max_position_embeddings=131072, encoder=encoder_name)
            progress.done()
        wanted = SparseWSIConfig.from_pretrained(checkpoint).encoder
        for one in shown:
            on_purpose = slide is None and checkpoint == DEMO_CHECKPOINT and one.image is not None  # the photograph
            one.encoder_mismatch = "allow" if on_purpose else encoder_mismatch
            EncoderCheck(wanted, one.encoder_mismatch)(str(one.features), one.metadata)  # before the server's start
            if untrained:
                one.note = UNTRAINED
            elif checkpoint != DEMO_CHECKPOINT:
                one.note = ""
            if question is not None:
                one.questions = (question, question)
        progress = Progress("starting vllm serve")
        args = ["--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager"]
        args += ["--dtype", "float32"] if untrained else []
        if any(one.encoder_mismatch == "allow" for one in shown):
            args += ["--mm-processor-kwargs", json.dumps({"encoder_mismatch": "allow"})]
        media = shown[0].features.parent
        with VllmServer(checkpoint, media, work / "server.log", args, on_wait=progress.tick) as server:
            progress.done()
            for one in shown:
                _show(server, one, checkpoint, out)
            if view:
                print(f"\nviewer     {server.root}/wsi/   (Ctrl-C ends it)", flush=True)
                _wait_for_interrupt(server)
    return 0


def _is_image(path: Path) -> bool:
    if SlideIdentity.of_file(path).content:  # a zarr store is a directory
        return False
    with open(path, "rb") as file:
        return is_image(path, file.read(64))


def write_photograph(folder: Path) -> Path:
    """scikit-image's photograph of stained colon (FHL2 by DAB, and haematoxylin) as a slide image of 512 x 512."""
    import tifffile
    from skimage import data

    path, per_cm = folder / "immunohistochemistry.tiff", 1e4 / PHOTOGRAPH_MPP
    with tifffile.TiffWriter(path) as file:
        file.write(
            data.immunohistochemistry(),
            tile=(256, 256),
            photometric="rgb",
            resolution=(per_cm, per_cm),
            resolutionunit="CENTIMETER",
        )
    return path


def _encoded(image: Path, encoder_name: str, work: Path, patch_px: int = 224, tissue: str = "otsu") -> DemoSlide:
    from vllm_wsi.encoding.encode_slide import EncodeSettings, encode_slide
    from vllm_wsi.encoding.encoders import load_encoder

    progress = Progress(f"encoding {image.name} with {encoder_name}")
    encoder = load_encoder(encoder_name)
    features = work / f"{image.stem}.safetensors"
    encode_slide(image, features, encoder, EncodeSettings(patch_px=patch_px, tissue=tissue))  # type: ignore[arg-type]
    progress.done()
    return DemoSlide(features, image, note=UNFAMILIAR)


def _virtual_slide(work: Path) -> DemoSlide:
    progress = Progress(f"making a virtual slide of {VIRTUAL_PATCHES:,} patches")
    virtual = HaystackWorld().slide("test", VIRTUAL_SLIDE, VIRTUAL_PATCHES)
    features = virtual.write(work / f"{virtual.name}.safetensors")
    progress.done()
    return DemoSlide(features, virtual=virtual, questions=(virtual.question(0), virtual.question(1)))


def _show(server: VllmServer, slide: DemoSlide, checkpoint: Path, out: Path) -> None:
    """Two questions, the selection between them, and what each stage took."""
    print(f"\nslide      {slide.features.name}: {slide.facts}")
    print(f"model      {checkpoint.name}")
    url = slide.features.as_uri()
    first = _ask(server, url, slide.questions[0], slide)
    selection = _post(f"{server.api}/wsi/select", {"url": url})
    _print_selection(selection)
    if slide.virtual is not None:
        rows = slide.virtual.key_patches.tolist()
        found = len(set(selection["indices"]) & set(rows))
        print(f"           {found} of the {len(rows)} patches that decide the answer are shown")
    _write_pictures(slide, checkpoint, out)
    second = _ask(server, url, slide.questions[-1], slide)
    _print_times(first, second)


def _write_pictures(slide: DemoSlide, checkpoint: Path, out: Path) -> None:
    """The same selection once more, here, with all its scores: the same file and checkpoint give the same patches."""
    with open_features(slide.features) as opened:
        selector = load_selector(str(checkpoint), encoder_mismatch=slide.encoder_mismatch)
        selection = selector.select(opened, keep_all_scores=True)
        name = opened.name
    try:
        placed = SelectionOverlay(selection, name, slide.image)
    except SlideError as error:  # the answers go on: the file does not say where its patches lie
        print(f"           nothing written: {error}")
        return
    out.mkdir(parents=True, exist_ok=True)
    start = out / slide.features.stem
    with placed as overlay:
        overlay.write_geojson(start.with_suffix(".geojson"))
        overlay.write_heatmap(start.with_suffix(".heatmap.png"))
        overlay.write_montage(start.with_suffix(".montage.png"))
    print(f"           written: {start}.geojson (QuPath), .heatmap.png, .montage.png")


def _wait_for_interrupt(server: VllmServer) -> None:
    try:
        while server.is_alive:
            time.sleep(1)
    except KeyboardInterrupt:
        print(file=sys.stderr)


def _ask(server: VllmServer, url: str, question: str, slide: DemoSlide) -> dict[str, float]:
    """Asks one streamed question and prints its answer; returns the seconds of each stage."""
    from openai import OpenAI

    before = server.metrics()
    indented = question.replace("\n", "\n           ")
    print(f"\nquestion   {indented}\nanswer     ", end="", flush=True)
    said = ""
    began = time.perf_counter()
    first_token = None
    client = OpenAI(base_url=server.api, api_key="none")
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    stream = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": parts}],  # type: ignore[list-item,misc]
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first_token = first_token or time.perf_counter()
            text = chunk.choices[0].delta.content
            said += text
            # An untrained model writes control characters too; a terminal must not obey them.
            print("".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in text), end="", flush=True)
    ended = time.perf_counter()
    print()
    if slide.note:
        print(f"           ({slide.note})")
    truth = slide.virtual
    if truth is not None and (finding := truth.option(question, said.strip())) is not None:
        verdict = "right" if finding == truth.finding_name else f"wrong, it shows {truth.finding_name}"
        print(f"           that is {finding}: {verdict}")
    after = server.metrics()
    names = {
        "read": "vllm_wsi:read_seconds_sum",
        "score + Top-K": "vllm_wsi:score_seconds_sum",
        "prefill": "vllm:request_prefill_time_seconds_sum",
        "decode": "vllm:request_decode_time_seconds_sum",
    }
    stages = {stage: after.get(name, 0.0) - before.get(name, 0.0) for stage, name in names.items()}
    stages["first token, as the client sees it"] = (first_token or ended) - began
    stages["whole answer, as the client sees it"] = ended - began
    return stages


def _print_selection(selection: dict) -> None:
    kept, total, coords = selection["num_selected"], selection["num_patches"], selection["coords"]
    unit = {"px": "level-0 px", "um": "microns", None: "none"}[selection["coord_unit"]]
    print(f"\nselection  {kept} of {total:,} patches were shown to the decoder; the best five (coordinates: {unit}):")
    best = sorted(range(kept), key=lambda i: -selection["scores"][i])[:5]
    for i in best:
        place = f"x {coords[i][0]:>7}  y {coords[i][1]:>7}" if coords else ""
        print(f"           patch {selection['indices'][i]:>7}  score {selection['scores'][i]:+.4f}  {place}")
    match = selection["encoder_match"]
    if match["remark"] is not None:
        print(f"           encoder: {match['features']}; the checkpoint's: {match['checkpoint']}; {match['remark']}")
    print("           Scores show what the model was given, not why it answered. Research use, not diagnosis.")


def _print_times(first: dict[str, float], second: dict[str, float]) -> None:
    print(f"\n{'stage (ms)':38}{'new slide':>12}{'same slide again':>20}")
    for stage in first:
        print(f"{stage:38}{first[stage] * 1e3:12.1f}{second[stage] * 1e3:20.1f}")


def _post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)
