"""What ends with a server: requests that vLLM would leave unanswered, and slides that are being read.

vLLM 0.32 stops its engine client before its HTTP server, and cancels the task that hands outputs to requests. Where
that comes before the task has told them that the engine is gone, they wait for ever, and the HTTP server for them.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from .selection import close_services


def install_shutdown() -> None:
    """Wraps the one method that every end of an API server goes through."""
    original = AsyncLLM.shutdown
    if getattr(original, "ends_slides", False):
        return

    def shutdown(self: AsyncLLM, timeout: float | None = None) -> None:
        close_services()
        handler = getattr(self, "output_handler", None)
        original(self, timeout)
        if handler is not None and not (loop := handler.get_loop()).is_closed():
            loop.call_soon_threadsafe(end_requests, self)

    shutdown.ends_slides = True  # type: ignore[attr-defined]
    AsyncLLM.shutdown = shutdown  # type: ignore[method-assign]


def end_requests(engine: Any) -> None:
    """Tells requests that still wait for tokens that the engine is gone; on the event loop's thread."""
    engine.output_processor.propagate_error(EngineDeadError())
