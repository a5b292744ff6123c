"""What the server shows of its slides, out of the same service and cache that serve them: `/v1/wsi/..` and `/wsi/`.

Everything that tells of slides asks for the server's API key (`key_guard.py`); the viewer page is empty without.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from vllm_wsi.errors import SlideError
from vllm_wsi.slides.feature_file import CoordUnit
from vllm_wsi.slides.places import Said

from .images import TILE_PX
from .slide_view import SlideView

PRIVATE = "private, no-cache"  # asked again each time: the answer is «unchanged» as long as the file is
KEPT = "private, max-age=86400, immutable"  # the URL says which state of the file it wants

router = APIRouter(prefix="/v1/wsi")


def slide_view(request: Request) -> SlideView:
    found = getattr(request.app.state, "wsi_slide_view", None)
    if found is None:
        raise SlideError("no slide model is served here, so no slide can be selected")
    return found


Shown = Annotated[SlideView, Depends(slide_view)]
SlideUrl = Annotated[str, Query(description="of the feature file, as a chat message would name it")]
Place = Annotated[float, Query(allow_inf_nan=False, description="level-0 pixels")]
Positive = Annotated[float | None, Field(gt=0, allow_inf_nan=False)]


class SelectRequest(BaseModel):
    """A slide's URL, as a chat message would name it, and what its file does not say."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(description="file://, https:// or data:, with #k=NUMBER for another K")
    mpp: Positive = Field(None, description="microns per level-0 pixel")
    patch_size_level0: Positive = Field(None, description="edge of a patch in level-0 pixels")
    coord_unit: CoordUnit | None = Field(None, description="of the file's coordinates: px or um")


@router.post("/select")
async def select(
    body: SelectRequest,
    shown: Shown,
    format: Literal["json", "geojson"] = "json",
    origin: Annotated[
        Literal["bounds", "slide"], Query(description="what GeoJSON counts from: bounds, as QuPath does, or pixel 0, 0")
    ] = "bounds",
) -> Response:
    said = Said(body.mpp, body.patch_size_level0, body.coord_unit)
    if format == "geojson":
        collection = await shown.geojson(body.url, said, cropped=origin == "bounds")
        return JSONResponse(collection, media_type="application/geo+json")
    return JSONResponse(await shown.select(body.url, said))


@router.get("/heatmap.png")
async def heat_map(
    request: Request,
    shown: Shown,
    url: SlideUrl,
    overlay: bool = False,
    mpp: Annotated[Positive, Query()] = None,
    patch_size_level0: Annotated[Positive, Query()] = None,
    coord_unit: CoordUnit | None = None,
    accept_guess: Annotated[bool, Query(description="draw upon the slide by a unit or size that is guessed")] = False,
) -> Response:
    said = Said(mpp, patch_size_level0, coord_unit, accept_guess)
    picture, etag = await shown.heat_map(url, overlay, said)
    if_none_match = request.headers.get("if-none-match")
    return _picture(
        None if if_none_match is not None and etag in if_none_match else picture, "image/png", etag, PRIVATE
    )


@router.get("/slides")
async def slides(shown: Shown) -> dict[str, Any]:
    return await shown.slides()


@router.get("/slide")
async def slide(shown: Shown, url: SlideUrl) -> dict[str, Any]:
    return await shown.slide(url)


@router.get("/qc.png")
async def qc_picture(request: Request, shown: Shown, url: SlideUrl) -> Response:
    picture, etag = await shown.qc_picture(url)
    if_none_match = request.headers.get("if-none-match")
    return _picture(
        None if if_none_match is not None and etag in if_none_match else picture, "image/png", etag, PRIVATE
    )


@router.get("/tile")
async def tile(
    request: Request, shown: Shown, url: SlideUrl, level: int, x: int, y: int, version: str | None = None
) -> Response:
    jpeg, etag, current = await shown.tile(url, level, x, y, request.headers.get("if-none-match"))
    return _picture(jpeg, "image/jpeg", etag, KEPT if version == current else PRIVATE)


@router.get("/region")
async def region(  # nine parameters, because FastAPI reads the query from them
    request: Request,
    shown: Shown,
    url: SlideUrl,
    x: Place,
    y: Place,
    width: Place,
    height: Place,
    side: Annotated[int, Query(ge=1, le=TILE_PX, description="longer side of the picture, in its pixels")] = 128,
    version: str | None = None,
) -> Response:
    if_none_match = request.headers.get("if-none-match")
    jpeg, etag, current = await shown.region(url, (x, y, width, height), side, if_none_match)
    return _picture(jpeg, "image/jpeg", etag, KEPT if version == current else PRIVATE)


def _picture(data: bytes | None, media_type: str, etag: str, cache: str) -> Response:
    headers = {"ETag": f'"{etag}"', "Cache-Control": cache, "Vary": "Authorization"}
    if data is None:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers | {"X-Content-Type-Options": "nosniff"})
