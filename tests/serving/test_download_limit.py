"""VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB bounds a slide that is fetched, as vLLM means it: 0 is no bound."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from safetensors.numpy import save_file
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.serving import vllm_hooks
from vllm_wsi.serving.connector import CONNECTOR

D = 64


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def url(tmp_path):
    """Of a slide of two and a half megabytes."""
    x = np.random.default_rng(0).standard_normal((10_000, D)).astype(np.float32)
    save_file({"features": x}, tmp_path / "slide.safetensors")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/slide.safetensors"
    server.shutdown()
    server.server_close()


@pytest.fixture
def connector(monkeypatch):
    monkeypatch.setattr(vllm_hooks, "_current", None)
    weights = seeded_scorer("patch", D, 16, seed=0).requires_grad_(False).weights()
    vllm_hooks.service_for(SlideSelector(weights, 8), "scorer of the download limit", 16)
    return MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR)


@pytest.mark.parametrize("megabytes", ["0", "3", "256"])
def test_a_slide_within_the_limit_or_without_one_is_selected(megabytes, url, connector, monkeypatch):
    monkeypatch.setenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", megabytes)
    assert connector.fetch_image(url).selection.num_patches == 10_000


def test_a_larger_slide_is_refused_with_the_name_of_the_limit(url, connector, monkeypatch):
    monkeypatch.setenv("VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB", "2")
    with pytest.raises(VLLMUnprocessableEntityError, match="exceeds VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB=2"):
        connector.fetch_image(url)
