#!/usr/bin/env python3
"""Takes the pictures of the viewer that README and docs show: `make pictures`, about two minutes.

A real slide image, the packaged tissue checkpoint, a real `vllm serve`, the real page in a real Chromium: what the
pictures show was selected and answered while they were taken. The slide is not part of this project.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from setup_browser import find_browser

from vllm_wsi.cli.demo_run import SERVER_ARGS
from vllm_wsi.cli.demo_slides import DemoSlide, encoded
from vllm_wsi.cli.demo_tissue import QUESTIONS, STEP_PX, tissue_scene
from vllm_wsi.encoding.encoders import LITE
from vllm_wsi.files import write_atomically
from vllm_wsi.serving.server_process import VllmServer

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "pictures"
SLIDE = "CMU-1-Small-Region.svs"  # OpenSlide's test data, CC0
WIDTH_PX, HEIGHT_PX = 1280, 800
MARGIN_PX = 6  # what is left of the stage stays out of the picture
MAX_BYTES = 400_000
MODEL = "vllm-wsi-tissue"  # as the page names it; the checkpoint's own folder is named by a digest
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
VIEWER = "OpenSeadragon.getViewer(document.getElementById('slide'))"


def main() -> None:
    source = Path(os.environ.get("VLLM_WSI_SHARED", ROOT.parent / "shared" / "data")) / "slides" / SLIDE
    if not source.is_file():
        sys.exit(f"pictures: {source}: found no such file, wanted the real slide (VLLM_WSI_SHARED names its folder)")
    browser = find_browser()
    if browser is None:
        sys.exit("pictures: found no Chromium on this machine, wanted one to show the viewer in (make browser)")
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-pictures-") as folder:
        slides = Path(folder) / "slides"
        slides.mkdir()
        image = slides / SLIDE
        shutil.copyfile(source, image)  # beside its features, where the viewer looks for it
        slide = encoded(image, LITE, slides, step_px=STEP_PX)
        scene = tissue_scene([slide])
        print("starting vllm serve", flush=True)
        args = [*SERVER_ARGS, "--served-model-name", MODEL]
        with VllmServer(scene.checkpoint, slides, Path(folder) / "server.log", args) as server:
            take_pictures(server, slide, browser)


def take_pictures(server: VllmServer, slide: DemoSlide, browser_path: str) -> None:
    """The whole page, light and dark, and the best of the kept patches from near."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=CHROMIUM_FLAGS)
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": WIDTH_PX, "height": HEIGHT_PX}, color_scheme=scheme, reduced_motion="reduce"
            )
            show(page, server, slide)
            ask(page, QUESTIONS[0])
            page.locator("#heat").fill("45")
            rest(page)
            save(page.screenshot(), OUT / f"viewer{'' if scheme == 'light' else '-dark'}.png")
            page.close()
        page = browser.new_page(viewport={"width": WIDTH_PX, "height": HEIGHT_PX}, reduced_motion="reduce")
        show(page, server, slide)
        page.locator("#patches button").first.click()
        rest(page)
        box = page.locator("#stage").bounding_box()
        assert box is not None
        margin = {
            "x": box["x"] - MARGIN_PX,
            "width": box["width"] + 2 * MARGIN_PX,
            "y": box["y"],
            "height": box["height"],
        }
        save(page.screenshot(clip=margin), OUT / "evidence.png")
        browser.close()


def show(page: Page, server: VllmServer, slide: DemoSlide) -> None:
    """The page on the slide, with all kept patches and the heat map."""
    page.goto(f"{server.root}/wsi/#slide={quote(slide.features.as_uri(), safe='')}")
    page.wait_for_selector("#overlay image[href]", state="attached")
    wait(page, "document.querySelectorAll('#patches img').length === 32")
    rest(page)


def ask(page: Page, question: str) -> None:
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:not([hidden])", timeout=120_000)
    print(f"question: {question}\nanswer: {page.locator('#log .assistant').last.inner_text()}")


def wait(page: Page, condition: str, seconds: float = 60) -> None:
    """For a JavaScript condition; Playwright's own wait needs an eval, which the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(f"() => Boolean({condition})"):
        if time.monotonic() > deadline:
            sys.exit(f"pictures: the page did not come to {condition} within {seconds:g} s")
        page.wait_for_timeout(50)


def rest(page: Page) -> None:
    """Until the view stands still and all its tiles are there, and nothing has the focus."""
    page.evaluate("document.activeElement?.blur()")
    page.wait_for_timeout(300)
    wait(page, f"{VIEWER}.world.getItemAt(0)?.getFullyLoaded()")
    page.wait_for_timeout(300)


def save(png: bytes, path: Path) -> None:
    """A screenshot as a PNG of 256 colours, a fifth of the bytes."""
    data = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    palette = picture.quantize(256, method=Image.Quantize.MEDIANCUT)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(data, "PNG", optimize=True)
    if len(data.getvalue()) > MAX_BYTES:
        sys.exit(f"pictures: {path}: found {len(data.getvalue())} bytes, wanted at most {MAX_BYTES}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())
    print(f"written: {path.relative_to(ROOT)}, {len(data.getvalue()) // 1000} kB")


if __name__ == "__main__":
    main()
