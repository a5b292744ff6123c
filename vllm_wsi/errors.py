"""The errors of this package: each message is one sentence that names file, key, and what was found and wanted.

The command prints the sentence of a `WsiError` alone. Any other error is a fault of ours, and shows its traceback.
"""

from __future__ import annotations


class WsiError(ValueError):
    """Something that the user can mend. A `ValueError`, because vLLM answers those with an HTTP 400."""

    def __init__(self, message: str) -> None:
        super().__init__(encodable(message))  # what a file says may hold half of a surrogate pair


class SlideError(WsiError):
    """A slide, its features or its image cannot be used."""


class EncoderError(WsiError):
    """A patch encoder cannot be had, or is another one than the checkpoint's."""


class CheckpointError(WsiError):
    """A checkpoint, or a decoder that becomes one, cannot be used."""


class SettingsError(WsiError):
    """An option or a settings file cannot be followed."""


class SetupError(WsiError):
    """The machine or the installation lacks something: a package, a device, a server."""


def encodable(text: str) -> str:
    """The text with what UTF-8 cannot hold replaced by question marks."""
    return text.encode("utf-8", "replace").decode()
