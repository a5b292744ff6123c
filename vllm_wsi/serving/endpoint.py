"""The endpoint plugin: the viewer's routes, and an answer for every request that is open at the server's end."""

from __future__ import annotations

from argparse import Namespace

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from vllm_wsi.model.config import SparseWSIConfig

from .open_requests import AnswerOpenRequests, OpenRequests, end_with_engine
from .viewer.page import page_router
from .viewer.routes import router
from .viewer.slide_view import SlideView
from .vllm_hooks import current_service


class SelectEndpoint:
    """The endpoint plugin; vLLM loads it when it is named by `--plugin vllm_wsi`."""

    name = "vllm_wsi"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._open = OpenRequests()

    def attach_router(self, app: FastAPI) -> None:
        app.add_middleware(AnswerOpenRequests, requests=self._open)
        app.include_router(router)
        app.include_router(page_router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        if engine_client is not None:
            end_with_engine(engine_client, self._open, state)
        if engine_client is None or not isinstance(engine_client.model_config.hf_config, SparseWSIConfig):
            return
        model = engine_client.model_config
        service = current_service()
        assert service is not None  # made with the engine client's processor
        rank = engine_client.vllm_config.parallel_config._api_process_rank
        service.start(max(0, rank))  # -1: the only one
        from .connector import slide_connector

        state.wsi_slide_view = SlideView(slide_connector(model))
