"""From the URL of a chat message to a selected slide, before vLLM's processor thread sees the request."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import vllm.envs as envs
from torch import Tensor
from urllib3.util import parse_url
from vllm.config import ModelConfig
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaIO
from vllm.multimodal.media.connector import global_thread_pool

from vllm_wsi.errors import SlideError
from vllm_wsi.model.question_text import question_text
from vllm_wsi.selection.chunk_reader import read_tensor_rows
from vllm_wsi.slides import SlideIdentity
from vllm_wsi.slides.feature_file import listed, shown

from . import metrics
from .client_errors import fetch_errors_as_422, naming_the_file_alone, stalls_as_503
from .object_ranges import ObjectPlace, object_place
from .remote_slide import RemoteSlide, giving_up_ranges, object_slide, web_slide
from .remote_state import RemoteState, remote_state, remote_state_now
from .service import SelectionService
from .slide_request import SelectedSlide, SlideRequest
from .spooled_slide import BY_VALUE, open_spooled
from .vllm_hooks import current_service

CONNECTOR = "vllm_wsi"
FETCH_SECONDS = 60  # vLLM's default of 5 is meant for photographs


class SlideMediaIO(MediaIO[SlideRequest]):
    """Turns what a URL leads to into a slide request; reads no features."""

    def __init__(
        self, k: int | None, encoder: str | None, question: str | None = None, keep_all_scores: bool = False
    ) -> None:
        self._k, self._encoder, self._question, self._keep_all_scores = k, encoder, question, keep_all_scores

    def load_file(self, filepath: Path) -> SlideRequest:
        return self.request(path=filepath.resolve())

    def load_base64(self, media_type: str, data: str) -> SlideRequest:
        return self.load_bytes(decode_base64(data, "data URL"))

    def load_bytes(self, data: bytes) -> SlideRequest:
        """Opens a slide that came by value, from a spool file that has no name while it is read."""
        digest = hashlib.blake2b(data, digest_size=20).hexdigest()
        identity = SlideIdentity(f"content:{digest}", len(data))
        return self.request(slide=open_spooled([data], BY_VALUE, identity, self._encoder))

    def remote_request(self, remote: RemoteSlide) -> SlideRequest:
        return self.request(told=remote.identity, open_told=partial(remote.open, self._encoder))

    def request(self, **where: Any) -> SlideRequest:
        """What is asked of the slide that `where` names: path, slide or told."""
        return SlideRequest(
            k=self._k, encoder=self._encoder, question=self._question, keep_all_scores=self._keep_all_scores, **where
        )


class PathIO(MediaIO[Path]):
    """The path of a file URL, after vLLM has checked that it lies below the allowed path."""

    def load_file(self, filepath: Path) -> Path:
        return filepath

    def load_base64(self, media_type: str, data: str) -> Path:
        raise NotImplementedError

    def load_bytes(self, data: bytes) -> Path:
        raise NotImplementedError


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class SlideConnector(MediaConnector):
    """vLLM's connector, with its rules for paths and domains, but it fetches slides instead of pictures."""

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> SelectedSlide:  # type: ignore[override]
        service, url, media_io = self._prepare(image_url)
        with fetch_errors_as_422(), stalls_as_503():
            if (place := object_place(url)) is not None:
                return service.select(self._find_object(place, media_io))
            if _is_web(url):
                return self._fetch_web(service, parse_url(url).url, media_io)
        with fetch_errors_as_422():
            request = self.load_from_url(url, media_io, fetch_timeout=fetch_seconds())
        with naming_the_file_alone(request.path), stalls_as_503():
            return service.select(request)

    async def fetch_image_async(  # type: ignore[override]
        self, image_url: str, *, image_mode: str | None = "RGB", keep_all_scores: bool = False
    ) -> SelectedSlide:
        """`keep_all_scores`: with the scores and places of all patches; no URL can ask for that."""
        service, url, media_io = self._prepare(image_url, keep_all_scores)
        with fetch_errors_as_422(), stalls_as_503():
            if url[:5].lower() == "file:":
                return await service.select_async(partial(self.load_from_url, url, media_io))
            if (place := object_place(url)) is not None:
                return await service.select_async(partial(self._find_object, place, media_io), elsewhere=True)
            if _is_web(url):
                return await self._fetch_web_async(service, parse_url(url).url, media_io)
            request = await self.load_from_url_async(url, media_io, fetch_timeout=fetch_seconds())
            return await service.select_async(request)

    def _fetch_web(self, service: SelectionService, url: str, media_io: SlideMediaIO) -> SelectedSlide:
        self._assert_url_in_allowed_media_domains(parse_url(url))
        state = None if envs.VLLM_MEDIA_CACHE else remote_state_now(self.connection, url, fetch_seconds())
        if state is not None:
            if (known := service.known(media_io.request(told=state.identity))) is not None:
                return known.result()
            if (remote := self._web_slide(url, state)) is not None:
                with giving_up_ranges():
                    return service.select(media_io.remote_request(remote))
        request = self.load_from_url(url, media_io, fetch_timeout=fetch_seconds())
        if state is not None:
            settle_identity(request, state, remote_state_now(self.connection, url, fetch_seconds()))
        return service.select(request)

    async def _fetch_web_async(self, service: SelectionService, url: str, media_io: SlideMediaIO) -> SelectedSlide:
        """A slide that is known is not fetched, and one that many ask for at once is fetched once, for all of them.

        With VLLM_MEDIA_CACHE, which keeps bytes by their URL for a day, no state that a server tells can be believed.
        """
        self._assert_url_in_allowed_media_domains(parse_url(url))
        state = None if envs.VLLM_MEDIA_CACHE else await remote_state(self.connection, url, fetch_seconds())
        if state is None:
            return await self._fetch_and_select(service, url, media_io, None)
        request = media_io.request(told=state.identity)
        if request not in service.fetching:
            if (known := await service.known_async(request)) is not None:
                return known
            if request not in service.fetching:
                task = asyncio.create_task(self._fetch_and_select(service, url, media_io, state))
                service.fetching[request] = task
                task.add_done_callback(lambda _: service.fetching.pop(request, None))
        # A client that goes away cancels its own wait alone.
        return await asyncio.shield(service.fetching[request])

    async def _fetch_and_select(
        self, service: SelectionService, url: str, media_io: SlideMediaIO, state: RemoteState | None
    ) -> SelectedSlide:
        if state is not None and (remote := self._web_slide(url, state)) is not None:
            with giving_up_ranges():
                return await service.select_async(media_io.remote_request(remote))
        request = await self.load_from_url_async(url, media_io, fetch_timeout=fetch_seconds())
        if state is not None:
            settle_identity(request, state, await remote_state(self.connection, url, fetch_seconds()))
        return await service.select_async(request)

    def _web_slide(self, url: str, state: RemoteState) -> RemoteSlide | None:
        return web_slide(self.connection, url, state, fetch_seconds(), self._charge)

    def _find_object(self, place: ObjectPlace, media_io: SlideMediaIO) -> SlideRequest:
        if place.allowed_by not in self.allowed_media_domains:
            raise SlideError(
                f"{place.allowed_by}: found a bucket that this server may not read, "
                f"wanted one that --allowed-media-domains names ({place.allowed_by})"
            )
        return media_io.remote_request(object_slide(place, fetch_seconds(), self._charge))

    def _charge(self, num_bytes: int) -> None:
        """Counts what came, also towards VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB, which vLLM 0.33 has.

        Raises:
            ValueError: it is more than that.
        """
        metrics.REMOTE_BYTES.inc(num_bytes)
        budget = getattr(self, "download_budget", None)
        if budget is not None:
            budget.charge(num_bytes)

    def fetch_image_embedding(self, data: str) -> Tensor:
        """The features [N, d] of an `image_embeds` part: a feature file of any kind, or vLLM's `torch.save`, in base64.

        vLLM's own reader would load pickles, and takes one vector for a slide of one patch.
        """
        request = SlideMediaIO(k=None, encoder=None).load_bytes(decode_base64(data, "image_embeds"))
        assert request.slide is not None
        with request.slide as slide:
            served().selector.check(slide)  # before all of it is in memory
            return read_tensor_rows(slide)

    async def fetch_image_embedding_async(self, data: str) -> Tensor:
        return await asyncio.get_running_loop().run_in_executor(global_thread_pool, self.fetch_image_embedding, data)

    def local_path(self, url: str) -> Path | None:
        """The path, below the allowed one, that a file URL names, links unfollowed; None for any other URL."""
        _, url, _ = self._prepare(url)
        return self.load_from_url(url, PathIO()) if url[:5].lower() == "file:" else None

    def _load_file_url(self, url_spec: Any, media_io: MediaIO[Any]) -> Any:
        try:
            return super()._load_file_url(url_spec, media_io)
        except RuntimeError as error:  # what Path.resolve raises
            name = Path(url_spec.path or "").name
            raise SlideError(f"{name}: found a loop of links, wanted a feature file") from error

    def _prepare(self, url: str, keep_all_scores: bool = False) -> tuple[SelectionService, str, SlideMediaIO]:
        service = served()
        if not isinstance(url, str):
            raise SlideError(f"image_url: found a {type(url).__name__}, wanted a URL")
        url, _, fragment = url.strip().partition("#")
        if not url:
            raise SlideError("image_url: found an empty URL, wanted the slide's file://, https:// or data: URL")
        if url[:5].lower() == "file:" and self.allowed_local_media_path is None:
            raise SlideError("file URLs are refused by this server; it was started without --allowed-local-media-path")
        if url[:5].lower() == "data:" and not url.partition(",")[0].endswith(";base64"):
            raise SlideError(f"data URL: found {url[:32]!r}, wanted data:[media type];base64,...")
        return service, url, SlideMediaIO(**parse_fragment(fragment), keep_all_scores=keep_all_scores)


def served() -> SelectionService:
    """Raises SlideError where this process serves no slide model."""
    service = current_service()
    if service is None:
        raise SlideError("no slide model is served here, so no slide can be selected")
    return service


def slide_connector(model: ModelConfig) -> SlideConnector:
    """A connector with the rules for paths and domains that a model's chat messages are under."""
    return MEDIA_CONNECTOR_REGISTRY.load(
        CONNECTOR,
        allowed_local_media_path=model.allowed_local_media_path,
        allowed_media_domains=model.allowed_media_domains,
    )


def _is_web(url: str) -> bool:
    return url[:5].lower() in ("http:", "https")


def settle_identity(request: SlideRequest, before: RemoteState, after: RemoteState | None) -> None:
    """Names a fetched slide by the state that its server told, where it told the same before and after the fetch, and
    of as many bytes as came. Otherwise the slide keeps the name that its content gives it."""
    assert request.slide is not None
    told = before.identity
    if after is not None and after.identity == told and request.slide.identity.size == told.size:
        request.slide.identity = told


def decode_base64(data: str, name: str) -> bytes:
    """The bytes of base64 text, as encoders write it: in lines, or percent-encoded as in a URL.

    Raises:
        SlideError: it is no base64.
    """
    try:
        return base64.b64decode("".join(unquote(data).split()), validate=True)
    except ValueError as error:  # binascii.Error, and characters beyond ASCII
        raise SlideError(f"{name}: found broken base64 ({error}), wanted a feature file") from error


def fetch_seconds() -> int:
    """VLLM_IMAGE_FETCH_TIMEOUT where it is set."""
    return envs.VLLM_IMAGE_FETCH_TIMEOUT if "VLLM_IMAGE_FETCH_TIMEOUT" in os.environ else FETCH_SECONDS


def parse_fragment(fragment: str) -> dict:
    """`k=64&encoder=NAME&q=QUESTION` of a slide's URL."""
    options = {key: values[-1] for key, values in parse_qs(fragment, keep_blank_values=True).items()}
    unknown = options.keys() - {"k", "encoder", "q"}
    if unknown or (fragment and not options):
        raise SlideError(
            f"URL fragment: found {listed(unknown) or shown(fragment)}, wanted k=NUMBER, encoder=NAME or q=QUESTION"
        )
    k = options.get("k")
    if k is not None and not (k.isascii() and k.isdigit() and len(k) < 10):
        raise SlideError(f"URL fragment: k: found {k!r}, wanted a whole number")
    question = question_text([options.get("q", "")]) or None
    return {"k": None if k is None else int(k), "encoder": options.get("encoder"), "question": question}
