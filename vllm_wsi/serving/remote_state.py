"""Which state of which slide a web URL leads to, told by the server's headers, without the slide's body.

The server is asked for one byte by GET, because a presigned URL allows no HEAD. A strong ETag (RFC 9110, 8.8) tells the
state; so does Last-Modified. Of a file that was modified less than a minute before the answer's Date neither is
believed: another state may have the same second, and many servers make their ETags of seconds. A server that gives
neither is fetched from at each question.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
import vllm.envs as envs
from urllib3.util import parse_url
from vllm.connections import HTTPConnection
from vllm.logger import init_logger

from vllm_wsi.slides import SlideIdentity

from .client_errors import FETCH_ERRORS

STRONG_AFTER = timedelta(seconds=60)
ONE_BYTE = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
PROBE_SECONDS = 10
SIGNING: Mapping[str, frozenset[str]] = {
    "sig": frozenset((  # Azure
        "sv", "ss", "srt", "sp", "se", "st", "spr", "sip", "sig", "sr", "skoid", "sktid", "skt", "ske", "sks", "skv",
    )),
    "key-pair-id": frozenset(("key-pair-id", "signature", "expires", "policy")),  # CloudFront
    "awsaccesskeyid": frozenset(("awsaccesskeyid", "signature", "expires")),  # S3, version 2
    "googleaccessid": frozenset(("googleaccessid", "signature", "expires")),  # Google Cloud Storage, version 2
}  # fmt: skip
"""Query parameters that allow a request and do not choose what it leads to, by the one that marks their kind."""
SIGNING_PREFIXES = ("x-amz-", "x-goog-")

logger = init_logger(f"vllm.{__name__}")


class RemoteState(NamedTuple):
    """One state of a slide on a web server."""

    identity: SlideIdentity
    validator: tuple[str, str]  # name and value of the header that tells it
    by_ranges: bool  # whether the server answers with parts of it


async def remote_state(connection: HTTPConnection, url: str, timeout: float) -> RemoteState | None:
    """None where the server's headers tell no state, or where it answers with an error, which fetching will tell of."""
    try:
        response = await connection.get_async_response(
            url, timeout=min(timeout, PROBE_SECONDS), extra_headers=ONE_BYTE, allow_redirects=_redirects()
        )
        async with response as answer:
            return state_by_headers(url, answer.status, answer.headers)
    except FETCH_ERRORS as error:
        logger.debug("%s: no state told (%s)", urlsplit(url).path, error)
        return None


def remote_state_now(connection: HTTPConnection, url: str, timeout: float) -> RemoteState | None:
    """The same, in the caller's thread."""
    try:
        with connection.get_response(
            url, stream=True, timeout=min(timeout, PROBE_SECONDS), extra_headers=ONE_BYTE, allow_redirects=_redirects()
        ) as answer:
            return state_by_headers(url, answer.status_code, answer.headers)
    except (requests.RequestException, OSError) as error:
        logger.debug("%s: no state told (%s)", urlsplit(url).path, error)
        return None


def state_by_headers(url: str, status: int, headers: Mapping[str, str]) -> RemoteState | None:
    """The state of what a URL leads to, or None.

    Args:
        status: of the answer to a request for one byte: 206, or 200 from a server that knows no ranges.
        headers: by names in any case.
    """
    length = _length(status, headers)
    validator = _validator(headers)
    if length is None or validator is None:
        return None
    return RemoteState(
        SlideIdentity(unsigned(url), length, content=validator),
        ("ETag", headers["ETag"]) if validator.startswith("ETag ") else ("Last-Modified", headers["Last-Modified"]),
        status == HTTPStatus.PARTIAL_CONTENT,
    )


def unsigned(url: str) -> str:
    """The URL without what only signs it: a new signature is the same slide. Everything else is kept as it is written.

    Args:
        url: as urllib3 normalises it.
    """
    parts = parse_url(url)
    pieces = [] if parts.query is None else parts.query.split("&")
    names = {piece.partition("=")[0].lower() for piece in pieces}
    signing = frozenset[str]().union(*(SIGNING[name] for name in names & SIGNING.keys()))

    def chooses(piece: str) -> bool:
        name = piece.partition("=")[0].lower()
        return name not in signing and not name.startswith(SIGNING_PREFIXES)

    kept = "&".join(filter(chooses, pieces))
    return parts._replace(auth=None, query=kept or None, fragment=None).url


def _length(status: int, headers: Mapping[str, str]) -> int | None:
    """Bytes of the whole."""
    if status == 206:
        found = re.fullmatch(r"bytes 0-0/([0-9]{1,18})", headers.get("Content-Range", ""))
        return int(found[1]) if found else None
    text = headers.get("Content-Length", "")
    is_plain = headers.get("Content-Encoding", "identity") == "identity"
    return int(text) if status == 200 and is_plain and re.fullmatch("[0-9]{1,18}", text) else None


def _validator(headers: Mapping[str, str]) -> str | None:
    etag = headers.get("ETag", "")
    modified, answered = _date(headers.get("Last-Modified")), _date(headers.get("Date"))
    is_young = modified is not None and answered is not None and answered - modified < STRONG_AFTER
    if re.fullmatch(r'"[^"]+"', etag):
        return None if is_young else f"ETag {etag}"
    if modified is None or answered is None or is_young:
        return None
    return f"Last-Modified {modified.isoformat()}"


def _date(text: str | None) -> datetime | None:
    try:
        found = parsedate_to_datetime(text or "")
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return found if found.tzinfo is not None else None


def _redirects() -> bool:
    return bool(envs.VLLM_MEDIA_URL_ALLOW_REDIRECTS)
