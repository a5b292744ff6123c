"""`POST /v1/wsi/select`: which patches the model is given, from the same service and cache that serve it."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from vllm_wsi.config import SparseWSIConfig
from vllm_wsi.slides import SlideError

router = APIRouter()


class SelectRequest(BaseModel):
    """A slide's URL, as a chat message would name it."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(description="file://, https:// or data:, with #k=NUMBER for another K")


@router.post("/v1/wsi/select")
async def select(body: SelectRequest, request: Request) -> dict[str, Any]:
    connector = getattr(request.app.state, "wsi_connector", None)
    if connector is None:
        raise SlideError("no slide model is served here, so no slide can be selected")
    selected = await connector.fetch_image_async(body.url)
    return selected.selection.record()


class SelectEndpoint:
    """The endpoint plugin; vLLM loads it when it is named by `--plugin vllm_wsi`."""

    name = "vllm_wsi"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        model = engine_client.model_config if engine_client is not None else None
        if model is None or not isinstance(model.hf_config, SparseWSIConfig):
            return
        from .connector import CONNECTOR

        # The same rules for paths and domains as for chat messages.
        state.wsi_connector = MEDIA_CONNECTOR_REGISTRY.load(
            CONNECTOR,
            allowed_local_media_path=model.allowed_local_media_path,
            allowed_media_domains=model.allowed_media_domains,
        )
