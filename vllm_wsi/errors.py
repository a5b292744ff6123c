"""The errors of this package: each message is one sentence that names file, key, and what was found and wanted.

The command prints the sentence of a `WsiError` alone. Any other error is a fault of ours, and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class WsiError(ValueError):
    """Something that the user can mend. A `ValueError`, because vLLM answers those with an HTTP 400."""

    def __init__(self, message: str) -> None:
        super().__init__(encodable(message))  # what a file says may hold half of a surrogate pair


class SlideError(WsiError):
    """A slide, its features or its image cannot be used."""


class FetchError(WsiError):
    """What lies on another machine cannot be had from there."""


class EncoderError(SlideError):
    """A patch encoder cannot be had, or a slide's features are of another one than the checkpoint's.

    A `SlideError`, because one slide of another encoder stops no other, and a server answers it with an HTTP 400.
    """


class CheckpointError(WsiError):
    """A checkpoint, or a decoder that becomes one, cannot be used."""


class SettingsError(WsiError):
    """An option or a settings file cannot be followed."""


class SetupError(WsiError):
    """The machine or the installation lacks something: a package, a device, a server."""


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around the imports of packages that an extra of this package brings.

    Raises:
        SetupError: one of them is not there; names it, and the extra.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("vllm_wsi"):
            raise  # a fault of ours
        found = f"found a package that does not load ({error})"
        if isinstance(error, ModuleNotFoundError) and error.name:
            found = f"{error.name}: found no such package"
        raise SetupError(f'{found}, wanted it: pip install "vllm-wsi[{extra}]"') from error


def encodable(text: str) -> str:
    """The text with what UTF-8 cannot hold replaced by question marks."""
    return text.encode("utf-8", "replace").decode()
