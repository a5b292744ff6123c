"""Ranged requests to a web server, each held to the state of the file that the server told first."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import requests
import urllib3
import vllm.envs as envs
from vllm.connections import HTTPConnection

from vllm_wsi.errors import FetchError

from .remote_bytes import Interrupted, RangesUnfit

SILENCE_SECONDS = 10  # without a byte, after which a request is given up
READ_BYTES = 1 << 20
REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
AGAIN = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)  # and all of 5xx


class HttpRanges:
    """A `RangeTransport` by HTTP.

    Args:
        connection: vLLM's.
        url: with its signature, where it has one.
        name: of the file, as errors name it.
        size: of the file, in bytes.
        validator: name and value of the header (ETag, Last-Modified) that tells its state.
        charge: called with the number of bytes that came; a ValueError of it ends the transfer.
    """

    # Many parameters: of a request and of what its answer must be.
    def __init__(
        self,
        connection: HTTPConnection,
        url: str,
        name: str,
        size: int,
        validator: tuple[str, str],
        charge: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._connection, self._url, self._name, self._size = connection, url, name, size
        self._validator, self._charge = validator, charge
        condition = "If-Match" if validator[0] == "ETag" else "If-Unmodified-Since"
        self._headers = {condition: validator[1], "Accept-Encoding": "identity"}

    def fetch(self, offset: int, out: memoryview, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        wanted = {"Range": f"bytes={offset}-{offset + len(out) - 1}", **self._headers}
        try:
            answer = self._connection.get_response(
                self._url,
                stream=True,
                timeout=min(seconds, SILENCE_SECONDS),
                extra_headers=wanted,
                allow_redirects=bool(envs.VLLM_MEDIA_URL_ALLOW_REDIRECTS),
            )
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:  # of a redirect, too
            raise Interrupted(type(error).__name__) from error
        with answer:
            self._check_status(answer.status_code)
            end = self._check_headers(offset, len(out), answer.headers)
            return self._read(answer.raw, out[: end - offset], deadline)

    def _check_status(self, status: int) -> None:
        if status == HTTPStatus.PARTIAL_CONTENT:
            return
        if status == HTTPStatus.OK:  # HTTP allows it at any time: a cache may do so as long as it fills
            raise RangesUnfit(f"{self._name}: found all of it, wanted a range")
        if status in AGAIN or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise Interrupted(f"HTTP {status}")
        if status in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE):
            raise RangesUnfit(f"{self._name}: the file changed while it was read; ask again")
        kind = FetchError if status in REFUSED else RangesUnfit
        raise kind(f"{self._name}: found HTTP {status} for a range of it, wanted HTTP 206")

    def _check_headers(self, offset: int, length: int, headers: Mapping[str, str]) -> int:
        """Where what comes ends: a server may send less than it was asked for, but nothing else."""
        name, told = self._validator
        if (found := headers.get(name)) != told:
            raise RangesUnfit(f"{self._name}: {name}: found {found}, wanted {told}; the file changed, ask again")
        place = headers.get("Content-Range", "")
        parts = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", place)
        first, last, size = map(int, parts.groups()) if parts else (-1, -1, -1)
        if first != offset or not first <= last < offset + length or size != self._size:
            raise RangesUnfit(
                f"{self._name}: Content-Range: found {place!r}, "
                f"wanted 'bytes {offset}-{offset + length - 1}/{self._size}'"
            )
        count = last + 1 - first
        if headers.get("Content-Encoding", "identity") != "identity" or headers.get("Content-Length") not in (
            None,
            str(count),
        ):
            raise RangesUnfit(
                f"{self._name}: Content-Length: found {headers.get('Content-Length')} "
                f"({headers.get('Content-Encoding', 'identity')}), wanted {count} by Content-Range"
            )
        return last + 1

    def _read(self, body: Any, out: memoryview, deadline: float) -> int:
        """How many bytes came; fewer than `out` takes where the transfer broke or took too long."""
        got = 0
        try:
            while got < len(out) and time.monotonic() < deadline:
                data = body.read1(min(READ_BYTES, len(out) - got))
                if not data:
                    break
                self._charge(len(data))
                out[got : got + len(data)] = data
                got += len(data)
            if got == len(out) and body.read1(1):
                raise RangesUnfit(f"{self._name}: found more bytes than its Content-Range told, wanted {len(out)}")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if not got:
                raise Interrupted(type(error).__name__) from error
        except FetchError:
            raise
        except ValueError as error:  # vLLM's bound for the downloads of one request
            raise FetchError(f"{self._name}: {error}") from error
        return got
