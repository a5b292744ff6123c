"""One state of a slide on another machine: scored while it arrives where its format allows, else from a spool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import vllm.envs as envs
from urllib3.util import parse_url
from vllm.connections import HTTPConnection, MediaDownloadSizeExceededError
from vllm.logger import init_logger

from vllm_wsi.errors import FetchError
from vllm_wsi.slides import FeatureFile, SlideIdentity
from vllm_wsi.slides.byte_source import NeedsWholeFile, read_bytes
from vllm_wsi.slides.formats.dispatch import open_source
from vllm_wsi.slides.formats.rows import RawRows

from . import metrics
from .http_ranges import HttpRanges
from .object_ranges import ObjectPlace, ObjectRanges
from .remote_bytes import RangesUnfit, RangeTransport, RemoteBytes
from .remote_state import RemoteState
from .spooled_slide import hold_coords, open_spooled

SPOOL_BYTES = 8 << 20  # that are fetched and written at once
MIB = 1 << 20

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class RemoteSlide:
    """A slide whose state is known and whose bytes come by ranges."""

    name: str  # as errors name it
    identity: SlideIdentity
    transport: RangeTransport
    seconds: float  # in which each part of it must come

    def open(self, encoder: str | None) -> FeatureFile:
        """Its rows are fetched as they are read.

        Raises:
            SlideError: as `open_features`.
            FetchError: it cannot be had, or is in another state by now.
        """
        try:
            slide = open_source(self._bytes(), self.identity, encoder)
            if isinstance(slide.rows, RawRows) and "h5" in slide.format:  # whose coordinates may be in too many pieces
                hold_coords(slide)
            return slide
        except NeedsWholeFile:
            return open_spooled(self._pieces(), self.name, self.identity, encoder)

    def _bytes(self) -> RemoteBytes:
        tries = max(1, envs.VLLM_MEDIA_FETCH_MAX_RETRIES)  # vLLM counts the first among them
        return RemoteBytes(self.name, self.identity.size, self.transport, self.seconds, tries)

    def _pieces(self) -> Iterator[bytes]:
        source = self._bytes()
        try:
            for begin in range(0, source.size, SPOOL_BYTES):
                yield read_bytes(source, begin, SPOOL_BYTES)
        finally:
            source.close()


@contextmanager
def giving_up_ranges() -> Iterator[None]:
    """Around the reading of a slide by ranges, which one whole answer of its server can take the place of."""
    try:
        yield
    except RangesUnfit as error:
        metrics.RANGES_GIVEN_UP.inc()
        logger.warning("%s; it is fetched whole", error)


# Many parameters: what a request to a web server is made of.
def web_slide(
    connection: HTTPConnection, url: str, state: RemoteState, seconds: float, charge: Callable[[int], None]
) -> RemoteSlide | None:
    """None where the server gives no ranges of it, or where it is larger than vLLM allows, which fetching will tell."""
    if not state.by_ranges or _is_too_large(state.identity.size):
        return None
    name = (parse_url(url).path or "").rpartition("/")[2] or "slide"
    transport = HttpRanges(connection, url, name, state.identity.size, state.validator, charge)
    return RemoteSlide(name, state.identity, transport, seconds)


def object_slide(place: ObjectPlace, seconds: float, charge: Callable[[int], None]) -> RemoteSlide:
    """Asks the object storage for the slide's state.

    Raises:
        FetchError: it is not there, may not be read, or is larger than vLLM allows.
        SetupError: obstore is not installed.
    """
    transport = ObjectRanges(place, seconds, charge)
    if _is_too_large(transport.size):
        limit = envs.VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB * MIB
        raise FetchError(f"{place.name}: {MediaDownloadSizeExceededError(limit)}; found {transport.size} bytes")
    return RemoteSlide(place.name, transport.identity, transport, seconds)


def _is_too_large(size: int) -> bool:
    return 0 < envs.VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB * MIB < size
