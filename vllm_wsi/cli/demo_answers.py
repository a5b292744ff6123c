"""What `vllm-wsi demo` asks of its server, and what it prints and draws of the answers."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from vllm_wsi.errors import SlideError
from vllm_wsi.model.checkpoint import load_selector
from vllm_wsi.rendering.overlay import SelectionOverlay
from vllm_wsi.serving.server_process import VllmServer
from vllm_wsi.slides import open_features

from .demo_slides import DemoSlide

ANSWER_TOKENS = 32
COUNTED = {  # stages of a request whose seconds the server counts
    "read": "vllm_wsi:read_seconds_sum",
    "score + Top-K": "vllm_wsi:score_seconds_sum",
    "prefill": "vllm:request_prefill_time_seconds_sum",
    "decode": "vllm:request_decode_time_seconds_sum",
}


def show(server: VllmServer, slide: DemoSlide, checkpoint: Path, out: Path) -> None:
    """Two questions, the selection between them, and what each stage took."""
    print(f"\nslide      {slide.features.name}: {slide.facts}")
    url = slide.features.as_uri()
    first = _ask(server, url, slide.questions[0], slide)
    if not first["read"]:
        print("           (the selection store knows this slide: nothing was read)")
    selection = _post(f"{server.api}/wsi/select", {"url": url})
    for warning in selection["warnings"]:  # beside the answer, as they tell how far to trust it
        print(f"           {warning}")
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


def _ask(server: VllmServer, url: str, question: str, slide: DemoSlide) -> dict[str, float]:
    """Asks one streamed question and prints its answer; returns the seconds of each stage."""
    before = server.metrics()
    indented = question.replace("\n", "\n           ")
    print(f"\nquestion   {indented}\nanswer     ", end="", flush=True)
    said, began, first_token = "", time.perf_counter(), None
    for text in _streamed(server, url, question):
        first_token = first_token or time.perf_counter()
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
    stages = {stage: after.get(name, 0.0) - before.get(name, 0.0) for stage, name in COUNTED.items()}
    stages["first token, as the client sees it"] = (first_token or ended) - began
    stages["whole answer, as the client sees it"] = ended - began
    return stages


def _streamed(server: VllmServer, url: str, question: str) -> Iterator[str]:
    """The answer's pieces, as the official client receives them."""
    from openai import OpenAI

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
            yield chunk.choices[0].delta.content


def _print_selection(selection: dict) -> None:
    kept, total, coords = selection["num_selected"], selection["num_patches"], selection["coords"]
    unit = {"px": "level-0 px", "um": "microns", None: "none"}[selection["coord_unit"]]
    print(f"\nselection  {kept} of {total:,} patches were shown to the decoder; the best five (coordinates: {unit}):")
    best = sorted(range(kept), key=lambda i: -selection["scores"][i])[:5]
    for i in best:
        place = f"x {coords[i][0]:>7}  y {coords[i][1]:>7}" if coords else ""
        print(f"           patch {selection['indices'][i]:>7}  score {selection['scores'][i]:+.4f}  {place}")
    if selection["sufficiency"] is not None:
        usual = selection["in_distribution"]
        print(
            f"           sufficiency {selection['sufficiency']:.2f}, in distribution {usual:.2f} (docs/train/trust.md)"
        )
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
