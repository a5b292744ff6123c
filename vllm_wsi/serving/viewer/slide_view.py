"""What the endpoints show of a slide: what the model was given of it, where that lies, and the slide itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cachetools import LRUCache

from vllm_wsi.errors import SlideError
from vllm_wsi.rendering.geojson import geojson
from vllm_wsi.selection.calibration import Trust
from vllm_wsi.selection.selection import Selection
from vllm_wsi.serving.client_errors import naming_the_file_alone
from vllm_wsi.serving.connector import SlideConnector, parse_fragment
from vllm_wsi.serving.slide_request import SelectedSlide
from vllm_wsi.serving.spooled_slide import BY_VALUE
from vllm_wsi.serving.vllm_hooks import current_service
from vllm_wsi.slides import SlideIdentity, open_features
from vllm_wsi.slides.places import Said, origin, refuse_guesses, with_image_mpp
from vllm_wsi.slides.regions import check_image, extent, said_size
from vllm_wsi.slides.units import positive_number

from .images import MAX_READ_PX, TILE_PX, ImagePool, Threads, deep_zoom, read_px, region, tile
from .slide_facts import Found, ImageFacts, digest_of, finite_size, mpp_of, place_patches
from .slide_folder import image_of, image_suffixes, list_slides, qc_picture_of

BOUNDS = "openslide.bounds-"
PICTURE_CACHE_BYTES = 32 << 20
MAX_QC_BYTES = 32 << 20
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
NO_IMAGE = "found no slide image of its name beside it, wanted one to show the slide"


class SlideView:
    """Answers the endpoints; reading headers and drawing pixels are each done on threads of their own.

    Args:
        connector: fetches slides as it does for chat messages, under the same rules.
    """

    def __init__(self, connector: SlideConnector) -> None:
        self._connector, self._images = connector, ImagePool()
        self._headers, self._pixels = Threads("wsi-headers"), Threads("wsi-pixels")
        self._pictures: LRUCache[str, bytes] = LRUCache(PICTURE_CACHE_BYTES, getsizeof=len)
        self._lock = threading.Lock()

    @property
    def _root(self) -> Path:
        root = self._connector.allowed_local_media_path
        if root is None:
            raise SlideError("this server has no slides of its own; it was started without --allowed-local-media-path")
        return root

    async def slides(self) -> dict[str, Any]:
        return await self._headers.run(list_slides, self._root)

    async def select(self, url: str, said: Said) -> dict[str, Any]:
        """The record of a selection, with the kept patches' level-0 rectangles or a sentence on why there are none."""
        selected = await self._connector.fetch_image_async(url)
        found = await self._headers.run(self._find_image, url)
        chosen, image = selected.selection, found.image
        name = _name(selected)
        record = chosen.record(name, said) | {"encoder": _encoder(url, chosen.metadata), "rects": None}
        record |= {"source": selected.source, **_trust(chosen)._asdict()}
        record |= {"extent_px": None, "guesses": chosen.guesses(name, said)}
        try:
            rects = chosen.rects(name, _said_with_image(said, chosen.metadata, image))
        except SlideError as error:
            return record | {"rects_missing": str(error), "extent_px": None if image is None else image.size_px}
        if image is not None:
            size_px: tuple[float, float] | None = image.size_px
        else:
            # Only all patches together would tell the slide's size; the kept ones span less.
            size_px = None if said_size(chosen.metadata) is None else extent(rects, chosen.metadata)
        return record | {"rects": rects.tolist(), "extent_px": size_px}

    async def geojson(self, url: str, said: Said, cropped: bool) -> dict[str, Any]:
        selected = await self._connector.fetch_image_async(url)
        image = (await self._headers.run(self._find_image, url)).image
        chosen, name = selected.selection, _name(selected)
        said = _said_with_image(said, chosen.metadata, image)
        rects, (unit, size) = chosen.rects(name, said), chosen.settle(name, said)
        assert unit is not None  # or there were no rectangles
        assert size is not None
        begin = origin(name, chosen.metadata, None if image is None else image.bounds)
        return geojson(rects, chosen.scores.tolist(), chosen.indices.tolist(), name, unit, size, begin, cropped)

    async def heat_map(self, url: str, overlay: bool, said: Said) -> tuple[bytes, str]:
        """(PNG, ETag) of all scores by rank, upon the slide or, as `overlay`, upon nothing."""
        selected = await self._connector.fetch_image_async(url, keep_all_scores=True)
        image = (await self._headers.run(self._find_image, url)).image
        etag = digest_of(selected.digest, overlay, said, None if image is None else image.digest)
        with self._lock:
            picture = self._pictures.get(etag)
        if picture is None:
            picture = await self._pixels.run(self._draw, selected, image, overlay, said)
            with self._lock:
                if len(picture) <= self._pictures.maxsize:
                    self._pictures[etag] = picture
        return picture, etag

    async def slide(self, url: str) -> dict[str, Any]:
        return await self._headers.run(self._describe, url)

    async def qc_picture(self, url: str) -> tuple[bytes, str]:
        """(PNG, ETag) of what `encode` took for tissue and for patches, where it lies beside the feature file."""
        return await self._headers.run(self._read_qc, url)

    async def tile(
        self, url: str, level: int, x: int, y: int, if_none_match: str | None
    ) -> tuple[bytes | None, str, str]:
        """(JPEG, ETag, version of the image); no JPEG where the client knows this ETag already."""
        return await self._pixels.run(self._read, url, tile, (level, x, y), if_none_match)

    async def region(
        self, url: str, rect: tuple[float, float, float, float], side: int, if_none_match: str | None
    ) -> tuple[bytes | None, str, str]:
        """As `tile`, of any part of the slide."""
        return await self._pixels.run(self._read, url, region, (rect, side), if_none_match)

    def _image_path(self, url: str) -> Path:
        path = self._connector.local_path(url)
        if path is None:
            raise SlideError(f"url: found {url[:32]!r}, wanted a file:// URL, as only a file has an image beside it")
        image = image_of(path, self._root)
        if image is None:
            extra = "" if image_suffixes() else ", and pip install 'vllm-wsi[slides]' to read it"
            raise SlideError(f"{path.name}: {NO_IMAGE}{extra}")
        return image

    def _find_image(self, url: str) -> Found:
        try:
            path = self._image_path(url)
            with self._images.image(path) as image:
                zoom = deep_zoom(image)
                digest = digest_of(SlideIdentity.of_file(path))
                return Found(
                    ImageFacts(
                        path,
                        digest,
                        (zoom.width_px, zoom.height_px),
                        mpp_of(image, path.name),
                        {key: value for key, value in image.properties.items() if key.startswith(BOUNDS)},
                        {
                            "size_px": TILE_PX,
                            "min_level": zoom.min_level,
                            "max_level": zoom.max_level,
                            "version": digest,
                        },
                    )
                )
        except ValueError as error:  # vLLM raises ValueError too; without an image the selection is shown all the same
            return Found(missing=str(error))

    def _describe(self, url: str) -> dict[str, Any]:
        path = self._connector.local_path(url)
        if path is None:
            raise SlideError(f"url: found {url[:32]!r}, wanted a file:// URL of a slide below the allowed path")
        path = path.resolve()
        found = self._find_image(url)
        remarks = [] if found.missing is None else [found.missing]
        try:
            has_qc = self._qc_path(url) is not None
        except SlideError as error:
            has_qc = False
            remarks.append(str(error))
        with naming_the_file_alone(path), open_features(path, _fragment_encoder(url)) as slide:
            place = place_patches(slide, path.name, found.image, remarks)
            return {
                "name": path.name,
                "num_patches": slide.num_patches,
                "encoder": _encoder(url, slide.metadata),
                "extent_px": place.size_px,
                "mpp": positive_number(slide.metadata.get("mpp")) or (found.image and found.image.mpp),
                "has_image": found.image is not None,
                "hears_questions": _hears_questions(),
                "tiles": found.image and found.image.tiles,
                "guesses": place.guesses,
                "has_qc": has_qc,
                "remarks": remarks,
            }

    def _qc_path(self, url: str) -> Path | None:
        path = self._connector.local_path(url)
        return None if path is None else qc_picture_of(path, self._root)

    def _read_qc(self, url: str) -> tuple[bytes, str]:
        path = self._qc_path(url)
        if path is None:
            raise SlideError("found no picture of tissue and patches beside this slide, wanted one of encode --qc")
        with naming_the_file_alone(path):
            identity = SlideIdentity.of_file(path)
            if identity.size > MAX_QC_BYTES:
                raise SlideError(f"{path}: found {identity.size} bytes, wanted at most {MAX_QC_BYTES}")
            with open(path, "rb") as file:
                data = file.read(MAX_QC_BYTES)
            if not data.startswith(PNG_MAGIC):
                raise SlideError(f"{path}: found no PNG file, wanted a picture of tissue and patches")
        return data, digest_of(identity)

    def _read(
        self, url: str, read: Callable[..., bytes], what: tuple[Any, ...], if_none_match: str | None
    ) -> tuple[bytes | None, str, str]:
        path = self._image_path(url)
        version = digest_of(SlideIdentity.of_file(path))
        etag = digest_of(version, read.__name__, what)
        if if_none_match is not None and etag in if_none_match:
            return None, etag, version
        with self._images.image(path) as image:
            return read(image, path.name, *what), etag, version

    def _draw(self, selected: SelectedSlide, image: ImageFacts | None, overlay: bool, said: Said) -> bytes:
        from vllm_wsi.encoding.png import png
        from vllm_wsi.rendering.pictures import HEAT_SIDE, heat_map, heat_overlay

        chosen, name = selected.selection, _name(selected)
        assert chosen.all_scores is not None
        if image is not None:
            refuse_guesses(name, chosen.guesses(name, said))
        said = _said_with_image(said, chosen.metadata, image)
        rects, kept = chosen.all_rects(name, said), chosen.rects(name, said)
        if image is not None:
            check_image(image.path.name, image.size_px, name, chosen.metadata, rects)
        size_px = image.size_px if image is not None else finite_size(name, extent(rects, chosen.metadata))
        heat = heat_overlay(rects, chosen.all_scores.numpy(), size_px)
        if overlay:
            return png(heat)
        return png(heat_map(heat, self._thumbnail(image, HEAT_SIDE), kept, size_px))

    def _thumbnail(self, facts: ImageFacts | None, side: int) -> Any:
        """None also where the slide has no level that is small enough to be read whole."""
        if facts is None:
            return None
        from vllm_wsi.encoding.image import thumbnail

        with self._images.image(facts.path) as image:
            width, height = facts.size_px
            if read_px(image, width, height, max(width, height) / side) > MAX_READ_PX:
                return None
            return thumbnail(image, facts.path.name, side)


def _name(selected: SelectedSlide) -> str:
    request = selected.request
    return BY_VALUE if request is None else request.name


def _trust(chosen: Selection) -> Trust:
    service = current_service()
    return Trust.of(None if service is None else service.calibration, chosen)


def _hears_questions() -> bool:
    """Whether a slide's patches depend on the question."""
    service = current_service()
    return service is not None and service.questions is not None


def _fragment_encoder(url: str) -> str | None:
    return parse_fragment(url.partition("#")[2])["encoder"]


def _encoder(url: str, metadata: Mapping[str, str]) -> str | None:
    return metadata.get("encoder") or _fragment_encoder(url)


def _said_with_image(said: Said, metadata: Mapping[str, str], image: ImageFacts | None) -> Said:
    return said if image is None else with_image_mpp(said, metadata, lambda: image.mpp)
