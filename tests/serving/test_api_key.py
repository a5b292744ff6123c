"""With `--api-key`, every route that could read a slide asks for the key: all but those that are named here."""

import re

import httpx
import pytest

from .conftest import KEY, make_slide, slide_message

pytestmark = pytest.mark.server

OPEN = {"/docs", "/docs/oauth2-redirect", "/health", "/load", "/metrics", "/openapi.json", "/ping", "/redoc",
        "/version", "/wsi", "/wsi/", "/wsi/main.js"}  # fmt: skip
SLIDES_OUTSIDE_V1 = {"/tokenize", "/invocations"}  # which vLLM itself leaves open


@pytest.fixture(scope="module")
def routes(shared_server) -> list[tuple[str, str]]:
    """(method, path) of all routes: those of vLLM's app with our plugin, built as the server builds it."""
    from vllm.entrypoints.launchers.app import build_app

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser  # vLLM 0.33
    except ImportError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "vllm_wsi")
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", shared_server.model])
        app = build_app(args, supported_tasks=("generate",))
    found = []
    for route in app.routes:
        path = re.sub(r"\{name:path\}", "main.js", route.path)
        path = re.sub(r"\{[^}]*\}", "x", path)
        found += [(method, path) for method in getattr(route, "methods", None) or ["GET"] if method != "HEAD"]
    return found


def status(server, method, path, key=None, json=None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.request(method, server.root + path, headers=headers, json=json, timeout=60).status_code


def test_the_routes_that_are_tried_are_all_that_the_running_server_tells_of(shared_server, routes):
    told = httpx.get(f"{shared_server.root}/openapi.json").json()["paths"]
    paths = {path for _, path in routes}
    assert {re.sub(r"\{[^}]*\}", "x", path) for path in told} <= paths
    assert paths >= SLIDES_OUTSIDE_V1 | {"/v1/wsi/select", "/v1/chat/completions"}


def test_no_route_but_the_open_ones_answers_without_the_key(shared_server, routes):
    asked = {path for method, path in routes if status(shared_server, method, path) == 401}
    assert {path for _, path in routes} - asked == OPEN


@pytest.mark.parametrize("key", [None, "wrong", f"{KEY}x", KEY.upper()])
@pytest.mark.parametrize("path", sorted(SLIDES_OUTSIDE_V1))
def test_a_slide_is_read_outside_v1_with_the_right_key_alone(shared_server, shared_folder, path, key):
    slide = make_slide(shared_folder / f"key-{abs(hash((path, key)))}.safetensors", 40)
    body = {"model": shared_server.model, "messages": slide_message(slide.as_uri()), "max_tokens": 1}
    before = shared_server.metrics()["vllm_wsi:selections_total"]
    assert status(shared_server, "POST", path, key, body) == 401
    assert shared_server.metrics()["vllm_wsi:selections_total"] == before
    assert status(shared_server, "POST", path, KEY, body) == 200
    assert shared_server.metrics()["vllm_wsi:selections_total"] == before + 1


@pytest.mark.parametrize("path", ["//tokenize", "/health/../tokenize", "/wsi/../tokenize", "/tokenize/", "/Tokenize"])
def test_no_other_spelling_of_a_route_reaches_it_without_the_key(shared_server, shared_folder, path):
    slide = make_slide(shared_folder / "spelled.safetensors", 40)
    body = {"model": shared_server.model, "messages": slide_message(slide.as_uri())}
    request = httpx.Request("POST", shared_server.root, json=body)
    request.url = httpx.URL(shared_server.root).copy_with(raw_path=path.encode())
    with httpx.Client(timeout=60) as client:
        assert client.send(request).status_code in (401, 404, 405)
