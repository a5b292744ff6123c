"""The viewer's view of slides without a server: that a heat map is drawn upon the slide's own image alone."""

import asyncio
import io

import numpy as np
import pytest
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from vllm_wsi.errors import SlideError
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.serving import vllm_hooks
from vllm_wsi.serving.connector import CONNECTOR
from vllm_wsi.serving.viewer.slide_view import SlideView
from vllm_wsi.slides.places import Said
from vllm_wsi.store.store_settings import StoreSettings

from .conftest import D
from .grid_slides import make_grid_slide

K = 8


@pytest.fixture
def view(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_hooks, "_current", None)
    monkeypatch.setattr(vllm_hooks, "_services", {})
    weights = seeded_scorer("patch", D, 16, seed=0).requires_grad_(False).weights()
    vllm_hooks.service_for(SlideSelector(weights, K), "scorer", 16, StoreSettings(tmp_path / "store", 1 << 30))
    return SlideView(MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR, allowed_local_media_path=str(tmp_path)))


def heat_map(view: SlideView, url: str, **said) -> np.ndarray:
    png, _ = asyncio.run(view.heat_map(url, False, Said(**said)))
    return np.asarray(Image.open(io.BytesIO(png)))


def remarks(view: SlideView, url: str) -> list[str]:
    return asyncio.run(view.slide(url))["remarks"]


def test_the_heat_map_is_drawn_upon_the_image_of_the_size_that_the_file_says(view, tmp_path):
    url = make_grid_slide(tmp_path, "own").as_uri()
    assert remarks(view, url) == []
    assert heat_map(view, url).shape == (1638, 2048, 3)


def test_no_heat_map_is_drawn_upon_an_image_of_another_size(view, tmp_path):
    url = make_grid_slide(tmp_path, "stranger", width="4000", height="3200").as_uri()
    sentence = "stranger.tiff: found 2000 x 1600 px, wanted 4000 x 3200, as stranger.safetensors says"
    (remark,) = remarks(view, url)
    assert remark.startswith(sentence)
    with pytest.raises(SlideError, match=sentence):
        heat_map(view, url)


def test_a_size_beyond_which_patches_begin_is_none_of_the_slide(view, tmp_path):
    url = make_grid_slide(tmp_path, "patch", width="200", height="200").as_uri()
    assert remarks(view, url) == []
    assert heat_map(view, url).shape == (1638, 2048, 3)
