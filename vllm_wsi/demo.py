"""`vllm-wsi demo`: a slide, a real server, the official client, an answer with its evidence and stage times."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from .demo_model import DEMO_CHECKPOINT
from .evaluation.haystack import HaystackSlide, HaystackWorld
from .server_process import VllmServer
from .slides import open_features

VIRTUAL_PATCHES = 100_000
VIRTUAL_SLIDE = 0  # number of the slide in haystack's test split
ANSWER_TOKENS = 32
QUESTION = "What does this slide show?"
SECOND_QUESTION = "Which finding supports this?"


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


def run_demo(slide: Path | None, question: str | None, checkpoint: Path | None) -> int:
    """Runs the demo; returns the exit status.

    Args:
        slide: feature file; None: a virtual slide, asked about with the trained demo checkpoint unless another is
            given.
        checkpoint: None, with a slide: random weights that fit it.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-demo-") as folder:
        work = Path(folder)
        virtual: HaystackSlide | None = None
        questions = [question or QUESTION, SECOND_QUESTION]
        if slide is None:
            progress = Progress(f"making a virtual slide of {VIRTUAL_PATCHES:,} patches")
            virtual = HaystackWorld().slide("test", VIRTUAL_SLIDE, VIRTUAL_PATCHES)
            slide = virtual.write(work / f"{virtual.name}.safetensors")
            progress.done()
            questions = [question] if question else [virtual.question(0), virtual.question(1)]
            checkpoint = checkpoint or DEMO_CHECKPOINT
        slide = slide.resolve()
        with open_features(slide) as opened:
            facts = f"{opened.num_patches:,} patches x {opened.feature_dim}, {opened.dtype}, {opened.format}"
            feature_dim = opened.feature_dim
        random_weights = checkpoint is None
        if checkpoint is None:
            checkpoint = work / "checkpoint"
            progress = Progress("making a small checkpoint with random weights")
            from .init_checkpoint import init_checkpoint

            init_checkpoint(checkpoint, feature_dim, max_position_embeddings=131072)
            progress.done()
        progress = Progress("starting vllm serve")
        args = ["--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager"]
        args += ["--dtype", "float32"] if random_weights else []
        with VllmServer(checkpoint, slide.parent, work / "server.log", args, on_wait=progress.tick) as server:
            progress.done()
            print(f"\nslide      {slide.name}: {facts}")
            note = "  (random weights: the answer is noise, the path is real)" if random_weights else ""
            print(f"model      {checkpoint.name}{note}")
            url = slide.as_uri()
            first = _ask(server, url, questions[0], virtual)
            evidence = _post(f"{server.api}/wsi/select", {"url": url})
            _print_evidence(evidence)
            if virtual is not None:
                found = len(set(evidence["indices"]) & set(virtual.evidence_rows.tolist()))
                print(
                    f"           {found} of the {len(virtual.evidence_rows)} patches that decide the answer are shown"
                )
            second = _ask(server, url, questions[-1], virtual)
            _print_times(first, second)
    return 0


def _ask(server: VllmServer, url: str, question: str, virtual: HaystackSlide | None) -> dict[str, float]:
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
    if virtual is not None and (finding := virtual.option(question, said.strip())) is not None:
        verdict = "right" if finding == virtual.finding_name else f"wrong, it shows {virtual.finding_name}"
        print(f"           that is {finding}: {verdict}")
    after = server.metrics()
    names = {
        "read": "vllm_wsi:read_seconds_total",
        "score + Top-K": "vllm_wsi:score_seconds_total",
        "prefill": "vllm:request_prefill_time_seconds_sum",
        "decode": "vllm:request_decode_time_seconds_sum",
    }
    stages = {stage: after.get(name, 0.0) - before.get(name, 0.0) for stage, name in names.items()}
    stages["first token, as the client sees it"] = (first_token or ended) - began
    stages["whole answer, as the client sees it"] = ended - began
    return stages


def _print_evidence(evidence: dict) -> None:
    kept, total, coords = evidence["num_kept"], evidence["num_patches"], evidence["coords"]
    unit = {"px": "level-0 px", "um": "microns", None: "none"}[evidence["coord_unit"]]
    print(f"\nevidence   {kept} of {total:,} patches were shown to the decoder; the best five (coordinates: {unit}):")
    best = sorted(range(kept), key=lambda i: -evidence["scores"][i])[:5]
    for i in best:
        place = f"x {coords[i][0]:>7}  y {coords[i][1]:>7}" if coords else ""
        print(f"           patch {evidence['indices'][i]:>7}  score {evidence['scores'][i]:+.4f}  {place}")
    print("           Scores show what the model was given, not why it answered. Research use, not diagnosis.")


def _print_times(first: dict[str, float], second: dict[str, float]) -> None:
    print(f"\n{'stage (ms)':38}{'new slide':>12}{'same slide again':>20}")
    for stage in first:
        print(f"{stage:38}{first[stage] * 1e3:12.1f}{second[stage] * 1e3:20.1f}")


def _post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)
