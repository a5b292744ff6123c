"""What the server shows of its slides, out of the same service and cache that serve them: `/v1/wsi/..` and `/wsi/`.

Everything that tells of slides asks for the server's API key (`key_guard.py`); the viewer page is empty without.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from vllm_wsi.errors import SettingsError, SlideError
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


def wants_json(request: Request) -> None:
    said = request.headers.get("content-type", "none")
    if said.partition(";")[0].strip().lower() != "application/json":
        raise SettingsError(f"content-type: found {said}, wanted application/json")


Shown = Annotated[SlideView, Depends(slide_view)]
SlideUrl = Annotated[str, Query(description="of the feature file, as a chat message would name it")]
Place = Annotated[float, Query(allow_inf_nan=False, description="level-0 pixels")]
Positive = Annotated[float | None, Field(gt=0, allow_inf_nan=False)]
MPP, PATCH_SIZE = "microns per level-0 pixel", "edge of a patch in level-0 pixels"
COORD_UNIT = "of the file's coordinates: px or um"
Version = Annotated[str | None, Query(description="of the image, as `slide` tells it: the answer may be kept")]


class SelectRequest(BaseModel):
    """A slide's URL, as a chat message would name it, and what its file does not say."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(description="file://, https:// or data:, with #k=NUMBER for another K")
    mpp: Positive = Field(None, description=MPP)
    patch_size_level0: Positive = Field(None, description=PATCH_SIZE)
    coord_unit: CoordUnit | None = Field(None, description=COORD_UNIT)


@router.post("/select", dependencies=[Depends(wants_json)])
async def select(
    body: SelectRequest,
    shown: Shown,
    format: Annotated[Literal["json", "geojson"], Query(description="of the answer")] = "json",
    origin: Annotated[
        Literal["bounds", "slide"], Query(description="what GeoJSON counts from: bounds, as QuPath does, or pixel 0, 0")
    ] = "bounds",
) -> Response:
    """The patches that a model is given of a slide: rows (`indices`), `scores`, level-0 rectangles (`rects`), where the
    selection came from, and what is said of the slide; as GeoJSON, annotations for QuPath."""
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
    overlay: Annotated[bool, Query(description="the patches alone, on nothing")] = False,
    mpp: Annotated[Positive, Query(description=MPP)] = None,
    patch_size_level0: Annotated[Positive, Query(description=PATCH_SIZE)] = None,
    coord_unit: Annotated[CoordUnit | None, Query(description=COORD_UNIT)] = None,
    accept_guess: Annotated[bool, Query(description="draw upon the slide by a unit or size that is guessed")] = False,
) -> Response:
    """A PNG of the rank of every patch's score, upon the slide; with `overlay`, the patches alone."""
    said = Said(mpp, patch_size_level0, coord_unit, accept_guess)
    picture, etag = await shown.heat_map(url, overlay, said)
    if_none_match = request.headers.get("if-none-match")
    return _picture(
        None if if_none_match is not None and etag in if_none_match else picture, "image/png", etag, PRIVATE
    )


@router.get("/slides")
async def slides(shown: Shown) -> dict[str, Any]:
    """The slides below the allowed path, and which of them have an image."""
    return await shown.slides()


@router.get("/slide")
async def slide(shown: Shown, url: SlideUrl) -> dict[str, Any]:
    """Of a slide, before anything is selected: its size in pixels, its scale, and its deep-zoom levels."""
    return await shown.slide(url)


@router.get("/qc.png")
async def qc_picture(request: Request, shown: Shown, url: SlideUrl) -> Response:
    """The PNG of tissue and patches that `vllm-wsi encode --qc` drew."""
    picture, etag = await shown.qc_picture(url)
    if_none_match = request.headers.get("if-none-match")
    return _picture(
        None if if_none_match is not None and etag in if_none_match else picture, "image/png", etag, PRIVATE
    )


@router.get("/tile")
async def tile(
    request: Request,
    shown: Shown,
    url: SlideUrl,
    level: Annotated[int, Query(description="of deep zoom: the largest is the whole slide's pixels")],
    x: Annotated[int, Query(description="column of the tile")],
    y: Annotated[int, Query(description="row of the tile")],
    version: Version = None,
) -> Response:
    """A JPEG tile of the slide's image, by deep zoom."""
    jpeg, etag, current = await shown.tile(url, level, x, y, request.headers.get("if-none-match"))
    return _picture(jpeg, "image/jpeg", etag, KEPT if version == current else PRIVATE)


# Many parameters: FastAPI reads a query by them.
@router.get("/region")
async def region(
    request: Request,
    shown: Shown,
    url: SlideUrl,
    x: Place,
    y: Place,
    width: Place,
    height: Place,
    side: Annotated[int, Query(ge=1, le=TILE_PX, description="longer side of the picture, in its pixels")] = 128,
    version: Version = None,
) -> Response:
    """A JPEG of a rectangle of the slide's image."""
    if_none_match = request.headers.get("if-none-match")
    jpeg, etag, current = await shown.region(url, (x, y, width, height), side, if_none_match)
    return _picture(jpeg, "image/jpeg", etag, KEPT if version == current else PRIVATE)


def _picture(data: bytes | None, media_type: str, etag: str, cache: str) -> Response:
    headers = {"ETag": f'"{etag}"', "Cache-Control": cache, "Vary": "Authorization"}
    if data is None:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers | {"X-Content-Type-Options": "nosniff"})
