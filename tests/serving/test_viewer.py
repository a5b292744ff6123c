"""The viewer page in a real headless Chromium, on a real `vllm serve` with an API key.

Screenshots go to the folder that VLLM_WSI_SCREENSHOTS names, else to pytest's temporary one; their paths are printed.
"""

import io
import os
import time
from pathlib import Path
from urllib.parse import quote

import h5py
import numpy as np
import openai
import pytest
from PIL import Image

from vllm_wsi.encoding.png import write_png
from vllm_wsi.slides import open_features

from ..axe_check import grave_findings
from .conftest import KEY, make_slide, slide_message
from .grid_slides import CELL, grid_colour, make_grid_image, make_grid_slide, make_real_slide

pytestmark = [pytest.mark.server, pytest.mark.browser]
KEPT = np.array([255, 200, 0])
VIEWER = "OpenSeadragon.getViewer(document.getElementById('slide'))"


@pytest.fixture(scope="module")
def media(shared_folder) -> Path:
    folder = shared_folder / "browsed"  # before the other files' folders: the page opens the first slide with an image
    folder.mkdir()
    make_grid_slide(folder)
    make_slide(folder / "bare.safetensors", 300)
    return folder


@pytest.fixture
def server(chromium, shared_server):  # without a browser no server is started
    return shared_server


@pytest.fixture
def new_page(chromium, server):
    """Opens pages; at the end none of them may have complained or asked anybody else."""
    contexts, complaints = [], []
    allowed = ["Ignoring tile"]  # OpenSeadragon, where a slide is closed while its tiles still come

    def make(key=KEY, **options):
        context = chromium.new_context(**{"viewport": {"width": 1300, "height": 850}} | options)
        contexts.append(context)
        if key:
            context.add_init_script(f"sessionStorage.setItem('vllm-wsi-key', '{key}')")
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(own) else complaints.append(f"asked {r.url}"))
        return page

    own = (server.root + "/", "blob:", "data:")
    make.allowed = allowed  # parts of complaints that a test provokes
    yield make
    for context in contexts:
        context.close()
    assert [c for c in complaints if not any(part in c for part in allowed)] == []


def show(page, server, path, wait_for_heat=True):
    """Opens the page on a slide and waits until all of it is there."""
    page.goto(f"{server.root}/wsi/#slide={quote(path.as_uri(), safe='')}")
    page.wait_for_selector("#patches button")
    if wait_for_heat:
        page.wait_for_selector("#overlay image[href]", state="attached")
    until(page, f"{VIEWER}.world.getItemAt(0)?.getFullyLoaded()")
    settle(page)


def until(page, condition, seconds=30):
    """Waits for a JavaScript condition; Playwright's own wait needs an eval, which the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(f"() => Boolean({condition})"):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(30)


def settle(page):
    """Until the view has come to rest and all its tiles are there."""
    last = None
    while (view := page.evaluate(f"{VIEWER}.viewport.getBounds(true).toString()")) != last:
        last = view
        page.wait_for_timeout(150)
    until(page, f"{VIEWER}.world.getItemAt(0).getFullyLoaded()")


def screenshot(page, name, tmp_path, **options) -> np.ndarray:
    folder = Path(os.environ.get("VLLM_WSI_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    page.screenshot(path=path, **options)
    print(f"screenshot: {path}")
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).astype(int)


def shown_patches(page, url):
    """What `POST /v1/wsi/select` answers; [(rank, score, rect)], best first."""
    answer = page.request.post(
        page.url.split("/wsi/")[0] + "/v1/wsi/select", data={"url": url}, headers={"Authorization": f"Bearer {KEY}"}
    ).json()
    order = np.argsort(-np.array(answer["scores"]), kind="stable")
    return [(rank + 1, answer["scores"][i], answer["rects"][i]) for rank, i in enumerate(order)]


def home_scale(page, width, height):
    """(CSS pixels a level-0 pixel, left, top) of a slide that is shown whole, by plain arithmetic."""
    box = page.locator("#slide .openseadragon-canvas").bounding_box()
    scale = min(box["width"] / width, box["height"] / height)
    left = box["x"] + (box["width"] - width * scale) / 2
    return scale, left, box["y"] + (box["height"] - height * scale) / 2


def check_outlines(page, url, width, height):
    scale, left, top = home_scale(page, width, height)
    canvas = page.locator("#slide .openseadragon-canvas").bounding_box()
    corner = np.array([canvas["x"], canvas["y"]])
    for rank, score, (x, y, w, h) in shown_patches(page, url):
        name = f"Kept patch, rank {rank}, score {score:.3f}"
        outline = page.get_by_role("button", name=name, exact=True)
        box = outline.locator("rect.line").evaluate(
            "e => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height] }"
        )
        wanted = [left + x * scale, top + y * scale, w * scale, h * scale]
        assert np.abs(np.array(box) - wanted).max() < 0.75, (name, box, wanted)
        by_viewer = page.evaluate(
            f"""([x, y]) => {{
                const at = {VIEWER}.world.getItemAt(0).imageToViewerElementCoordinates(new OpenSeadragon.Point(x, y));
                return [at.x, at.y];
            }}""",
            [x, y],
        )
        assert np.abs(np.array(box[:2]) - corner - by_viewer).max() < 0.75, name


def test_outlines_lie_on_the_pixels_of_their_patches(new_page, server, media, tmp_path):
    """Every patch of this slide has a colour of its own: what is inside an outline must be that patch."""
    path = media / "grid.safetensors"
    page = new_page()
    show(page, server, path)
    check_outlines(page, path.as_uri(), 2000, 1600)
    picture = screenshot(page, "grid", tmp_path)
    scale, left, top = home_scale(page, 2000, 1600)
    for _, _, (x, y, w, h) in shown_patches(page, path.as_uri()):
        inside = picture[round(top + (y + h / 2) * scale), round(left + (x + w / 2) * scale)]
        wanted = grid_colour(int(x) // CELL - 1, int(y) // CELL - 1)
        assert np.abs(inside - wanted).max() <= 8
        edge = picture[
            round(top + y * scale) - 2 : round(top + y * scale) + 3, round(left + (x + w / 3) * scale)
        ]  # the upper side
        assert np.abs(edge - KEPT).sum(axis=1).min() < 60


def test_the_heat_map_is_drawn_as_strongly_as_the_slider_says(new_page, server, media, tmp_path):
    path = media / "grid.safetensors"
    page = new_page()
    show(page, server, path)
    scale, left, top = home_scale(page, 2000, 1600)
    (_, _, (x, y, w, h)), *_ = shown_patches(page, path.as_uri())
    at = round(top + (y + h / 2) * scale), round(left + (x + w / 2) * scale)
    colours = {}
    for percent in (0, 50, 100):
        page.locator("#heat").fill(str(percent))
        assert page.locator("#heat-value").inner_text() == f"{percent} %"
        colours[percent] = screenshot(page, f"heat-{percent}", tmp_path)[at]
    assert np.abs(colours[100] - [252, 255, 164]).max() <= 3  # the highest rank
    assert np.abs(colours[50] - (colours[0] + colours[100]) / 2).max() <= 4
    page.locator("#heat").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#heat").input_value() == "95"
    page.get_by_label("Outlines").uncheck()
    assert not page.locator("#overlay .patch").first.is_visible()


def test_a_streamed_answer_is_the_answer(new_page, server, media):
    path = media / "grid.safetensors"
    page = new_page()
    show(page, server, path)
    page.get_by_role("textbox", name="Question").fill("Which tissue is this?")
    page.get_by_role("button", name="Ask").click()  # the page is busy when this returns, or has its answer already
    page.wait_for_selector("#send:not([hidden])")
    client = openai.OpenAI(base_url=server.api, api_key=KEY, max_retries=0, timeout=120)

    def answer(messages):
        chat = client.chat.completions.create(model=server.model, messages=messages, temperature=0)
        return chat.choices[0].message.content

    first = slide_message(path.as_uri(), question="Which tissue is this?")
    assert page.locator("#log .user").all_text_contents() == ["Which tissue is this?"]
    assert page.locator("#log .assistant").all_text_contents() == [answer(first)]


def test_a_second_question_keeps_the_slide_in_the_first_message(new_page, server, media):
    page = new_page()
    show(page, server, media / "grid.safetensors")
    sent = []

    def short(route):
        """The same request with a short answer: this model never ends by itself, and there is no room for more."""
        body = route.request.post_data_json
        sent.append(body["messages"])
        route.continue_(post_data=body | {"max_tokens": 4})

    page.route("**/chat/completions", short)
    for turn, question in enumerate(("What?", "Where?"), 1):
        page.get_by_role("textbox", name="Question").fill(question)
        page.keyboard.press("Enter")
        until(page, f"document.querySelectorAll('#log .assistant:not(.waiting)').length == {turn}")
        page.wait_for_selector("#send:not([hidden])")
    answers = page.locator("#log .assistant").all_text_contents()
    assert len(answers) == 2
    slide = {"type": "image_url", "image_url": {"url": (media / "grid.safetensors").as_uri()}}
    first = {"role": "user", "content": [slide, {"type": "text", "text": "What?"}]}
    assert sent[0] == [first]
    assert sent[1] == [first, {"role": "assistant", "content": answers[0]}, {"role": "user", "content": "Where?"}]
    page.get_by_role("button", name="Start over").click()
    assert page.locator("#log p").count() == 0


def test_an_answer_can_be_stopped_and_a_refusal_is_shown(new_page, server, media):
    page = new_page()
    new_page.allowed.append("status of 400")  # the browser's own words for it
    show(page, server, media / "grid.safetensors")
    question = page.get_by_role("textbox", name="Question")
    page.route("**/chat/completions", lambda route: None)  # never sent on: no hand is quicker than this model
    question.fill("What is it?")
    page.keyboard.press("Enter")
    page.locator("#stop").click()
    page.wait_for_selector("#log .note")
    assert page.locator("#log .note").inner_text() == "Stopped."
    page.unroute("**/chat/completions")
    page.get_by_role("button", name="Start over").click()
    question.fill("<|slide|> What is it?")
    page.keyboard.press("Enter")
    assert "slide tokens" in page.locator("#log .error").inner_text()
    assert question.input_value() == "<|slide|> What is it?"  # to be mended


def centre(page):
    return page.evaluate(
        f"""() => {{
            const at = {VIEWER}.world.getItemAt(0).viewportToImageCoordinates({VIEWER}.viewport.getCenter(true));
            return [at.x, at.y];
        }}"""
    )


def test_a_patch_that_is_clicked_comes_to_the_middle(new_page, server, media):
    path = media / "grid.safetensors"
    page = new_page()
    show(page, server, path)
    patches = shown_patches(page, path.as_uri())
    scale, left, top = home_scale(page, 2000, 1600)
    x, y, w, h = patches[4][2]
    page.mouse.click(left + (x + w / 2) * scale, top + (y + h / 2) * scale)
    page.wait_for_selector("#overlay .chosen", state="attached")
    settle(page)
    assert np.abs(np.array(centre(page)) - [x + w / 2, y + h / 2]).max() < 1
    assert page.locator("#patches button[aria-pressed=true] b").inner_text() == "5"
    x, y, w, h = patches[20][2]
    page.locator("#patches button").nth(20).click()
    settle(page)
    assert np.abs(np.array(centre(page)) - [x + w / 2, y + h / 2]).max() < 1


def test_the_picture_of_tissue_and_patches_opens_where_there_is_one(new_page, server, media):
    path = make_grid_slide(media, "checked")
    page = new_page()
    show(page, server, path)
    assert page.locator("#qc").is_hidden()
    write_png(path.with_suffix(".qc.png"), np.full((30, 50, 3), 77, np.uint8))
    page.reload()
    page.wait_for_selector("#qc:not([hidden])")
    with page.expect_popup() as opened:
        page.locator("#qc").click()
    opened.value.wait_for_selector("img", state="attached")
    assert opened.value.evaluate("[document.images[0].naturalWidth, document.images[0].naturalHeight]") == [50, 30]


def test_the_keyboard_alone_is_enough(new_page, server, media, tmp_path):
    page = new_page()
    page.goto(f"{server.root}/wsi/")
    page.wait_for_selector("#slide-list a")

    def tab_to(selector, tries=40):
        for _ in range(tries):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"the Tab key does not reach {selector}")

    tab_to("#filter")
    page.keyboard.type("browsed grid")
    assert page.locator("#slide-list a").all_text_contents() == ["browsed/grid.safetensors"]
    tab_to("#slide-list a")
    page.keyboard.press("Enter")
    page.wait_for_selector("#patches button")
    until(page, f"{VIEWER}.world.getItemAt(0)?.getFullyLoaded()")
    settle(page)
    assert "grid.safetensors" in page.url
    tab_to("#overlay .patch")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    screenshot(page, "focus", tmp_path)
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Kept patch, rank 3,")
    page.keyboard.press("Enter")
    settle(page)
    x, y, w, h = shown_patches(page, (media / "grid.safetensors").as_uri())[2][2]
    assert np.abs(np.array(centre(page)) - [x + w / 2, y + h / 2]).max() < 1
    tab_to("#heat")
    page.keyboard.press("ArrowRight")
    tab_to("#patches button")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#patches button[aria-pressed=true] b").inner_text() == "4"
    tab_to("#question")
    page.keyboard.type("What?")
    tab_to("#send")
    page.keyboard.press("Enter")
    page.wait_for_selector("#log .assistant", state="attached")
    page.reload()  # the address keeps the slide
    page.wait_for_selector("#patches button")
    assert page.locator("#slide-list a[aria-current]").text_content() == "browsed/grid.safetensors"


def test_without_the_key_the_page_asks_for_it(new_page, server, media):
    page = new_page(key=None)
    new_page.allowed.append("status of 401")
    page.goto(f"{server.root}/wsi/")
    page.wait_for_selector("#problem:not([hidden])")
    assert "API key" in page.locator("#problem").inner_text()
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector("#patches button")
    page.locator("#slide-list a", has_text="browsed/grid").click()
    page.wait_for_selector("#patches.with-pictures img")
    until(page, f"{VIEWER}.world.getItemAt(0)?.getFullyLoaded()")
    assert page.locator("#problem").is_hidden()


def test_a_slide_without_an_image_or_without_places_is_shown_as_far_as_it_goes(new_page, server, media):
    page = new_page()
    show(page, server, media / "bare.safetensors")
    assert page.locator("#heat").input_value() == "100"
    assert "no slide image" in page.locator("#remark").inner_text()
    assert page.locator("#overlay .patch").count() == 32
    np.save(media / "flat.npy", np.random.default_rng(0).standard_normal((40, 48)).astype(np.float32))
    page.goto(f"{server.root}/wsi/#slide={quote((media / 'flat.npy').as_uri(), safe='')}")
    page.wait_for_selector("#patches button:disabled")
    assert "coords: found none" in page.locator("#remark").inner_text()
    assert page.locator("#patches button").count() == 32


def test_a_slide_that_cannot_be_read_is_an_error_in_one_sentence_and_the_next_works(new_page, server, media):
    page = new_page()
    new_page.allowed.append("status of 400")
    gone = (media / "gone.safetensors").as_uri()
    page.goto(f"{server.root}/wsi/#slide={quote(gone, safe='')}")
    page.wait_for_selector("#problem:not([hidden])")
    assert "gone.safetensors: found no readable file" in page.locator("#problem").inner_text()
    page.locator("#slide-list a", has_text="browsed/grid").click()
    page.wait_for_selector("#patches button")
    assert page.locator("#problem").is_hidden()


def test_markup_in_a_files_name_and_metadata_stays_text(new_page, server, media):
    path = make_grid_slide(
        media, "<img src=x onerror=alert(1)>", encoder="./<script>alert(2)</script>"
    )  # a path tells no encoder
    page = new_page()
    show(page, server, path)
    assert "<script>alert(2)</script>" in page.locator("#title").inner_text()
    assert page.locator("#slide-list img, #title script").count() == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"color_scheme": "light"}),
        ("dark", {"color_scheme": "dark"}),
        ("narrow", {"viewport": {"width": 420, "height": 900}}),
    ],
)
def test_the_real_slide(new_page, server, media, shared_data, tmp_path, name, options):
    path = media / "CMU-1-Small-Region.safetensors"
    if not path.exists():
        make_real_slide(media, shared_data)
    page = new_page(**options)
    show(page, server, path)
    check_outlines(page, path.as_uri(), 2220, 2967)
    assert "not why it answered" in page.locator("#caution").inner_text()
    assert "not for diagnosis" in page.locator("#caution").inner_text()
    until(page, "document.querySelectorAll('#patches img').length === 32")
    assert page.evaluate("document.documentElement.scrollWidth") <= options.get("viewport", {"width": 1300})["width"]
    page.locator("#heat").fill("40")
    screenshot(page, f"slide-{name}", tmp_path, full_page=name == "narrow")
    began = time.monotonic()
    page.reload()
    page.wait_for_selector("#patches button")
    print(f"the page was whole again after {time.monotonic() - began:.2f} s")


def says(page, url, **said):
    """Lets the server's selections of a slide say more: its checkpoint has no calibration."""

    def changed(route):
        if route.request.post_data_json != {"url": url} or "format" in route.request.url:
            return route.continue_()
        answer = route.fetch()
        return route.fulfill(response=answer, json=answer.json() | said)

    page.route("**/wsi/select", changed)


UNSURE = {"sufficiency": 0.125, "in_distribution": 0.5, "warnings": ["what is asked for is probably not on it. " * 5]}


def test_what_is_said_of_trust_pushes_no_part_of_the_slide_out_of_view(new_page, server, media):
    path = media / "grid.safetensors"
    page = new_page(viewport={"width": 1300, "height": 560})  # the slide is as high as its window
    says(page, path.as_uri(), **UNSURE)
    show(page, server, path)
    assert "probably not on it" in page.locator("#trust").inner_text()
    check_outlines(page, path.as_uri(), 2000, 1600)
    page.locator("#patches button").nth(3).click()
    settle(page)
    near = page.evaluate(f"{VIEWER}.viewport.getZoom()")
    page.get_by_role("textbox", name="Question").fill("<|slide|>")
    new_page.allowed.append("status of 400")
    page.keyboard.press("Enter")
    page.wait_for_selector("#log .error")
    assert page.evaluate(f"{VIEWER}.viewport.getZoom()") == near  # only a slide that is shown whole is laid out anew


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_the_page_in_any_of_its_states(new_page, server, media, scheme):
    path = media / "grid.safetensors"
    page = new_page(color_scheme=scheme)
    new_page.allowed.append("status of 400")
    says(page, path.as_uri(), **UNSURE)
    show(page, server, path)
    page.locator("#heat").fill("50")
    page.locator("#patches button").nth(2).click()
    settle(page)
    assert grave_findings(page) == []  # slide, heat map, words on trust, a chosen patch
    question = page.get_by_role("textbox", name="Question")
    for text, shown in (("Which tissue is this?", "#log .assistant:not(.waiting)"), ("<|slide|>", "#log .error")):
        question.fill(text)
        page.keyboard.press("Enter")
        page.wait_for_selector(shown)
        page.wait_for_selector("#send:not([hidden])")
    page.locator("#key-box summary").click()
    assert grave_findings(page) == []  # answer, refusal, the box for the key
    gone = (media / "gone.safetensors").as_uri()
    page.goto(f"{server.root}/wsi/#slide={quote(gone, safe='')}")
    page.wait_for_selector("#problem:not([hidden])")
    assert grave_findings(page) == []  # no slide, and why


def test_guessed_places_are_shown_upon_the_slide_only_when_the_user_wants_them(new_page, server, media):
    path = media / "guessed.h5"
    grid = make_grid_slide(media, "guessed-places")
    with open_features(grid) as slide, h5py.File(path, "w") as file:
        file["feats"], file["coords"] = slide.read_rows(0, slide.num_patches), slide.read_coords()
    make_grid_image(media / "guessed.tiff")
    page = new_page()
    show(page, server, path, wait_for_heat=False)
    assert "Guessed, as the feature file does not say it: the unit" in page.locator("#remark").text_content()
    assert page.locator("#overlay .patch").count() == 0
    assert page.locator("#overlay image[href]").count() == 0
    assert page.locator("#patches button:enabled").count() == 0
    page.get_by_role("button", name="Show the patches at the guessed places").click()
    page.wait_for_selector("#overlay image[href]", state="attached")
    until(page, "document.querySelectorAll('#overlay .patch').length == 32")
    assert not page.locator("#accept").is_visible()
    assert "Guessed" in page.locator("#remark").text_content()
