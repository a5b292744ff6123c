"""The pages that mkdocs builds of README and docs, in a real Chromium."""

import functools
import http.server
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from .axe_check import grave_findings

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(folder of the built pages, address of a web server that serves them)."""
    if not (ROOT / "mkdocs.yml").is_file():
        pytest.skip("this repository has no mkdocs.yml: there are no pages to build")
    if find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed here")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_the_first_page_and_on_the_longest(chromium, site, scheme):
    folder, address = site
    longest = max(folder.rglob("index.html"), key=lambda path: path.stat().st_size)
    with chromium.new_context(color_scheme=scheme, viewport={"width": 1300, "height": 850}) as context:
        page = context.new_page()
        page.route(lambda url: not url.startswith(address), lambda route: route.abort())  # this machine may be offline
        for path in (folder / "index.html", longest):
            page.goto(f"{address}/{path.relative_to(folder).as_posix()}")
            page.wait_for_timeout(500)  # the theme changes tables when the page has loaded
            assert grave_findings(page) == [], path
