"""The pages: built strictly, as a reader gets them, and held to the code that they speak of."""

import functools
import os
import re
import subprocess
import sys
import threading
import tomllib
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from vllm_wsi.settings import Settings

from .axe_check import grave_findings

ROOT = Path(__file__).resolve().parents[1]
TROUBLES = ROOT / "docs" / "serve" / "troubleshooting.md"
# Of vLLM's argparse, not of this project.
NOT_OURS = {"unrecognized arguments: --plugin"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages; a link or picture that leads nowhere, or a setting without a description, ends the build."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return out


class Assets(HTMLParser):
    """What a page makes a browser load, other than by a click."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in {"script", "img", "iframe", "source", "video", "audio", "embed"}:
            self.found += [values["src"]] if values.get("src") else []
            self.found += [one.split()[0] for one in (values.get("srcset") or "").split(",") if one.strip()]
        elif tag == "link" and values.get("rel") not in {"canonical", "next", "prev"}:
            self.found.append(values["href"])


def test_the_site_loads_nothing_from_another_host(site):
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assets = {asset for page in pages for asset in Assets(page).found}
    assets |= {url for style in styles for url in re.findall(r"""url\(["']?([^"')]+)""", style.read_text())}
    assert len(pages) > 30
    assert any(asset.endswith(".css") for asset in assets)
    assert [asset for asset in assets if urlsplit(asset).scheme not in {"", "data"} or urlsplit(asset).netloc] == []


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("docs/reference/cli", ["vllm-wsi init-checkpoint", "--accept-guess", "slide images to feature files"]),
        ("docs/reference/settings", ["selection_store_gib", "questions_per_sequence", "tau_start", "absent"]),
        ("docs/reference/http", ["/v1/wsi/select", "/v1/wsi/region", "level-0 pixels"]),
        ("docs/reference/python", ["open_features", "score_topk", "SlideSelector"]),
        ("docs/serve/options", ["vllm_wsi:selection_fallbacks", "reason"]),
        ("docs/architecture/vllm", ["AuthenticationMiddleware.__call__", "key_guard.py"]),
        ("", ["For research, not for diagnosis"]),
    ],
)
def test_the_pages_hold_what_is_made_of_the_code(site, page, said):
    text = (site / page / "index.html").read_text()
    text = re.sub(r"<[^>]+>", "", text)
    assert [one for one in said if one not in text] == []
    assert "<!-- generated" not in text


def test_the_reference_names_every_group_of_settings_that_a_file_can_hold(site):
    import vllm_wsi.serving.server_options
    import vllm_wsi.study.calibrate
    import vllm_wsi.training.settings  # noqa: F401

    text = (site / "docs/reference/settings/index.html").read_text()
    groups = [kind for kind in Settings.__subclasses__() if kind.__module__.startswith("vllm_wsi.training")]
    assert len(groups) >= 5
    assert [f"{kind.__name__}: {key}" for kind in groups for key in kind.model_fields if f">{key}<" not in text] == []


def test_every_message_that_troubleshooting_explains_is_one_of_the_codes():
    sources = "".join(path.read_text() for path in sorted((ROOT / "vllm_wsi").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", sources)  # sentences that go on in the next line
    messages = re.findall(r"^\| `([^`]+)` \|", TROUBLES.read_text(), re.MULTILINE)
    assert len(messages) > 30
    parts = {part.strip() for one in messages if one not in NOT_OURS for part in re.split(r"\.\.|\(\)|\[|\]", one)}
    assert [part for part in parts if len(part) > 3 and part not in code] == []


def test_the_table_of_the_rooms_names_each_layer_that_the_import_rules_know():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one["type"] == "layers")
    rooms = {room.strip().removeprefix("vllm_wsi.") for layer in layers for room in re.split(r"[:|]", layer)}
    page = (ROOT / "docs" / "architecture" / "layers.md").read_text()
    assert [room for room in rooms if f"`{room}`" not in page] == []


@pytest.fixture(scope="module")
def address(site):
    """Of a web server of the site: a real browser opens it as a reader does."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.browser
def test_a_reader_finds_a_word_and_the_browser_asks_no_other_host(chromium, address):
    asked: list[str] = []
    with chromium.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        page.on("request", lambda request: asked.append(urlsplit(request.url).netloc))
        page.goto(f"{address}/docs/reference/settings/")
        page.goto(f"{address}/")
        search = page.get_by_role("textbox", name="Search")
        search.click()
        search.press_sequentially("supervisor")
        page.locator(".md-search-result__link", has_text="A server that runs for long").first.click()
        page.wait_for_url("**/docs/serve/running/**")
    assert set(asked) == {urlsplit(address).netloc}


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_the_first_page_and_on_the_longest(chromium, site, address, scheme):
    longest = max(site.rglob("index.html"), key=lambda path: path.stat().st_size)
    with chromium.new_context(color_scheme=scheme, viewport={"width": 1300, "height": 850}) as context:
        page = context.new_page()
        for path in (site / "index.html", longest):
            page.goto(f"{address}/{path.relative_to(site).as_posix()}")
            page.wait_for_timeout(500)  # the theme changes tables when the page has loaded
            assert grave_findings(page) == [], path
