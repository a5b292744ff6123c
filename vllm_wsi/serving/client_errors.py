"""Errors as a client may see them: the file's name without its folder, and the HTTP status that tells what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import aiohttp
import requests
from vllm.exceptions import GracefulHTTPError, VLLMUnprocessableEntityError

from vllm_wsi.errors import FetchError, SlideError

from .stalling_pool import SlidesStalled

FETCH_ERRORS = (aiohttp.ClientError, requests.RequestException, TimeoutError, OSError)


@contextmanager
def naming_the_file_alone(path: Path | None) -> Iterator[None]:
    """Errors that leave the server name the file, not its folder (vLLM would blot out the whole path)."""
    try:
        yield
    except SlideError as error:
        if path is None:
            raise
        raise SlideError(str(error).replace(str(path), path.name)) from error


@contextmanager
def stalls_as_503() -> Iterator[None]:
    """HTTP 503: clients retry on it by themselves, and load balancers try another server."""
    try:
        yield
    except SlidesStalled as error:
        raise GracefulHTTPError(f"The slide cannot be read now: {error}", HTTPStatus.SERVICE_UNAVAILABLE) from error


@contextmanager
def fetch_errors_as_422() -> Iterator[None]:
    """What goes wrong while a URL is fetched."""
    try:
        yield
    except FetchError as error:
        raise VLLMUnprocessableEntityError(f"The slide could not be fetched: {error}") from error
    except FETCH_ERRORS as error:
        raise VLLMUnprocessableEntityError(
            f"The slide could not be fetched: {type(error).__name__}: {error}"
        ) from error
