"""What becomes of requests that are open when the server ends: each is answered, so that the server can end.

vLLM 0.32 stops its engine client first and the HTTP server after it. The client's shutdown cancels two tasks: one that
would say that the engine is gone, and the one that would pass this on to the requests. Where both are cancelled in one
turn of the event loop, the requests wait for ever, and the HTTP server waits for them. Nobody ends requests that wait
for something else, as for a slide, an image or the rest of their own body. So this layer ends all of them itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse
from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger

from .vllm_hooks import close_services

if TYPE_CHECKING:
    from starlette.datastructures import State
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

GRACE_SECONDS = 5  # for clients that do not read their answer, where uvicorn was given no time of its own
logger = init_logger(f"vllm.{__name__}")  # vLLM shows its own loggers alone


class OpenRequests:
    """The requests of one app that are not answered yet; used on the event loop's thread alone."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task] = set()
        self.refusing = False

    def refuse(self) -> None:
        """From now on, further requests get an HTTP 503."""
        self.refusing = True

    def end(self) -> None:
        """Also those that are open: an HTTP 503, or, where the answer has begun, the end of the connection."""
        self.refusing = True
        if self.tasks:
            logger.info("[shutdown] %d open requests are answered with HTTP 503", len(self.tasks))
        for task in self.tasks:
            task.cancel()


class AnswerOpenRequests:
    """The ASGI layer that knows the open requests."""

    def __init__(self, app: ASGIApp, requests: OpenRequests) -> None:
        self._app, self._requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        requests, task, begun = self._requests, asyncio.current_task(), False
        assert task is not None

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        if requests.refusing:
            return await _ending(scope, receive, send)
        requests.tasks.add(task)
        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:
            if not requests.refusing or not task.cancelling():
                raise
            task.uncancel()
            if not begun:
                await _ending(scope, receive, send)
            # Else uvicorn closes the connection: the client sees that the answer is not whole.
        finally:
            requests.tasks.discard(task)


async def _ending(scope: Scope, receive: Receive, send: Send) -> None:
    error = {"message": "The server is shutting down; ask again later", "type": "ServiceUnavailableError", "code": 503}
    headers = {"Retry-After": "5", "Connection": "close"}
    await JSONResponse({"error": error}, 503, headers)(scope, receive, send)


def end_with_engine(engine: EngineClient, requests: OpenRequests, state: State) -> None:
    """Wraps this client's `shutdown`, through which every end of an API server goes; vLLM calls it on any thread.

    Without a shutdown time (`--shutdown-timeout 0`) open requests are ended before the engine, with one they have
    until the engine has ended.
    """
    loop, stop = asyncio.get_running_loop(), engine.shutdown

    def on_loop(function: Callable[[], None]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(function)

    def bound_the_wait() -> None:
        server = getattr(state, "server", None)  # vLLM's uvicorn server, once it serves
        if server is not None and server.config.timeout_graceful_shutdown is None:
            server.config.timeout_graceful_shutdown = GRACE_SECONDS

    def shutdown(timeout: float | None = None) -> None:
        on_loop(requests.refuse if timeout else requests.end)
        on_loop(bound_the_wait)
        if not timeout:
            close_services()
        try:
            stop(timeout=timeout)
        finally:
            on_loop(requests.end)
            close_services()  # slides that are read for nobody any more would hold up the end of the process

    engine.shutdown = shutdown  # type: ignore[method-assign]
