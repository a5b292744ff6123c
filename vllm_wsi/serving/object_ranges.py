"""Slides in object storage: `s3://BUCKET/KEY`, `gs://BUCKET/KEY`, `az://CONTAINER/KEY`, by obstore.

obstore, and not fsspec: one wheel speaks to all three and reads ranges with `If-Match`, without Python's lock; fsspec
needs three further libraries, each with its own pins of a cloud's SDK, and has no condition for a range.
Which account, region and endpoint, is in the server's environment alone, by the names that the clouds' own tools use.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from vllm.logger import init_logger

from vllm_wsi.errors import FetchError, SlideError, needs_extra
from vllm_wsi.slides import SlideIdentity

from .remote_bytes import Interrupted, RangesUnfit

if TYPE_CHECKING:
    from obstore.store import AzureStore, GCSStore, S3Store

SCHEMES = ("s3", "gs", "az")
RETRIES = 2

logger = init_logger(f"vllm.{__name__}")


class ObjectPlace(NamedTuple):
    """Where an object lies."""

    scheme: str
    bucket: str
    key: str

    @property
    def allowed_by(self) -> str:
        """What `--allowed-media-domains` must name."""
        return f"{self.scheme}://{self.bucket}"

    @property
    def name(self) -> str:
        """As errors name it."""
        return self.key.rpartition("/")[2]


def object_place(url: str) -> ObjectPlace | None:
    """None: it is a URL of another kind. The key is percent-decoded, as in any URL.

    Raises:
        SlideError: it holds anything beside bucket and key, such as credentials.
    """
    scheme, colon, _ = url.partition(":")
    if not colon or scheme.lower() not in SCHEMES:
        return None
    try:
        parts = urlsplit(url)
        odd = parts.username is not None or parts.port is not None or "?" in url
    except ValueError:
        odd = True
    key = "" if odd else unquote(parts.path.removeprefix("/"))
    if odd or not parts.netloc or not key:
        raise SlideError(
            f"image_url: found a {scheme.lower()} URL of another form, wanted {scheme.lower()}://BUCKET/KEY"
        )
    return ObjectPlace(scheme.lower(), parts.netloc, key)


class ObjectRanges:
    """One state of an object, as a `RangeTransport`.

    Args:
        seconds: of a request.
        charge: called with the number of bytes that came; a ValueError of it ends the transfer.

    Raises:
        FetchError: it is not there, or may not be read.
        SetupError: obstore is not installed.
    """

    def __init__(self, place: ObjectPlace, seconds: float, charge: Callable[[int], None] = lambda count: None) -> None:
        with needs_extra("object-store"):
            import obstore

        self._get, self._place, self._charge = obstore.get, place, charge
        try:
            with self._errors():
                self._store = _store(place.scheme, place.bucket, seconds)
                found = obstore.head(self._store, place.key)
        except Interrupted as error:
            raise FetchError(f"{place.name}: {error}") from error
        self.size: int = found["size"]
        self._etag = found["e_tag"]
        if not self._etag:
            raise FetchError(f"{place.name}: ETag: found none, wanted one, by which its states are told apart")
        self.identity = SlideIdentity(f"{place.allowed_by}/{place.key}", self.size, content=f"ETag {self._etag}")

    def fetch(self, offset: int, out: memoryview, seconds: float) -> int:
        got, deadline = 0, time.monotonic() + seconds
        with self._errors():
            found = self._get(
                self._store, self._place.key, options={"range": (offset, offset + len(out)), "if_match": self._etag}
            )
            meta = found.meta
            if tuple(found.range) != (offset, offset + len(out)) or (meta["size"], meta["e_tag"]) != (
                self.size,
                self._etag,
            ):
                raise RangesUnfit(
                    f"{self._place.name}: found bytes {found.range} of {meta['size']} in the state {meta['e_tag']}, "
                    f"wanted {offset} to {offset + len(out)} of {self.size} in the state {self._etag}"
                )
            for piece in found.stream():
                if time.monotonic() > deadline:
                    return got
                data = memoryview(piece)
                if got + len(data) > len(out):
                    raise RangesUnfit(f"{self._place.name}: found more than {len(out)} bytes, wanted just those")
                self._charge(len(data))
                out[got : got + len(data)] = data
                got += len(data)
        return got

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from obstore import exceptions

        name = self._place.name
        try:
            yield
        except FileNotFoundError as error:
            raise FetchError(f"{name}: found no such object in {self._place.allowed_by}, wanted one") from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise FetchError(f"{name}: found no right to read it in {self._place.allowed_by}, wanted one") from error
        except exceptions.PreconditionError as error:
            raise RangesUnfit(f"{name}: the file changed while it was read; ask again") from error
        except (exceptions.InvalidPathError, exceptions.NotSupportedError) as error:
            raise FetchError(f"{name}: found a key or a state that its store refuses, wanted an object") from error
        except (exceptions.BaseError, OSError) as error:
            # Its text tells the store's address, which is no matter of the client's.
            logger.warning("%s: %s", self._place.allowed_by, str(error).partition("\n")[0])
            raise Interrupted(f"{self._place.allowed_by} gave an error, see the server's log") from error
        except FetchError:
            raise
        except ValueError as error:  # vLLM's bound for the downloads of one request
            raise FetchError(f"{name}: {error}") from error


@functools.lru_cache(maxsize=64)
def _store(scheme: str, bucket: str, seconds: float) -> S3Store | GCSStore | AzureStore:
    """With its connections, which all requests share."""
    from obstore.store import AzureStore, GCSStore, S3Store

    kinds: dict[str, tuple[Callable[..., Any], str]] = {
        "s3": (S3Store, "AWS"), "gs": (GCSStore, "GOOGLE"), "az": (AzureStore, "AZURE"),
    }  # fmt: skip
    kind, prefix = kinds[scheme]
    # With options for the client, obstore no longer reads this one from the environment.
    allow_http = os.environ.get(f"{prefix}_ALLOW_HTTP", "").lower() in ("1", "true")
    client = {"timeout": timedelta(seconds=seconds), "allow_http": allow_http}
    retries = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=seconds)}
    return kind(bucket, client_options=client, retry_config=retries)  # type: ignore[no-any-return]
