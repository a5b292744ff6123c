"""The viewer at `/wsi/`: files of the package, which hold nothing about any slide."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, RedirectResponse, Response

FOLDER = Path(__file__).parent / "static"
OSD_STYLE = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"  # the one <style> that OpenSeadragon 6.1.0 adds
MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",  # the licences of what the page is made of
}
FILES = frozenset(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*"))
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'self'; style-src 'self' {OSD_STYLE}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

page_router = APIRouter(prefix="/wsi", include_in_schema=False)


@page_router.get("")
async def without_slash() -> Response:
    return RedirectResponse("wsi/")  # relative: the server may stand below a proxy's path


@page_router.get("/")
async def page() -> Response:
    return _file("index.html")


@page_router.get("/{name:path}")
async def file(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    path = FOLDER / name
    media_type = MEDIA_TYPES.get(path.suffix)
    if media_type is None or name not in FILES:
        raise HTTPException(404, f"{name!r} is no part of the viewer")
    return FileResponse(path, media_type=media_type, headers=HEADERS)
