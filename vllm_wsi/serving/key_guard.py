"""With an API key, vLLM guards only routes below `/v1` and a few others. This module guards every route that reads
slides.

`/tokenize`, `/invocations` and others outside those prefixes parse messages too, and so fetch and select slides.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

OPEN_ROUTES = frozenset(
    (
        "/health",
        "/ping",
        "/load",
        "/version",
        "/metrics",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
        "/wsi",
    )
)
"""Routes that read no slide and that probes, scrapers and browsers ask without a key."""

OPEN_FOLDERS = ("/metrics/", "/wsi/", "/static/")  # `/wsi/`: the viewer's page, which is empty without a key


def asks_for_key(path: str) -> bool:
    """Whether a route needs the key of a server that has one: all routes but the open ones, so that a new route of vLLM
    is guarded too."""
    return path not in OPEN_ROUTES and not path.startswith(OPEN_FOLDERS)


def asking_for_the_key(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Wraps `AuthenticationMiddleware.__call__`, which exists where a key is set.

    vLLM decides what a key is and which keys are valid. A server of another model stays as it is, because the check is
    wrapped where a slide model is set up.
    """

    def call(self: Any, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if asks_for_key(path) and not self.verify_token(Headers(scope=scope)):
                return JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
        return original(self, scope, receive, send)

    return call
