"""A slide that came whole over the network, read from a file that has no name while it is read."""

from __future__ import annotations

import codecs
import tempfile
from collections.abc import Iterable

from vllm_wsi.errors import SlideError
from vllm_wsi.slides import FeatureFile, SlideIdentity, open_features

BY_VALUE = "slide sent by value"
HEAD_BYTES = 64


def open_spooled(
    pieces: Iterable[bytes | memoryview], name: str, identity: SlideIdentity, encoder: str | None
) -> FeatureFile:
    """Opens what the pieces are in their order.

    Args:
        name: as errors name it.
        identity: which the slide gets.
        encoder: which features, where it holds several.

    Raises:
        SlideError: there are no bytes, or what they are cannot be used.
    """
    pieces = iter(pieces)
    first = next(pieces, b"")
    if not first:
        raise SlideError(f"{name}: found no bytes, wanted a feature file")
    # A CSV table begins with text, perhaps with a byte order mark; binary formats may hold a comma too.
    head = bytes(first[:HEAD_BYTES]).removeprefix(codecs.BOM_UTF8)
    suffix = ".csv" if b"," in head and head.isascii() and min(head) >= ord("\t") else ""
    with tempfile.NamedTemporaryFile(prefix="vllm-wsi-", suffix=suffix) as spool:
        spool.write(first)
        spool.writelines(pieces)
        spool.flush()
        try:
            slide = open_features(spool.name, encoder)
            hold_coords(slide)  # while the spool still has a name
        except SlideError as error:
            raise SlideError(str(error).replace(spool.name, name)) from None
    slide.name, slide.identity = name, identity
    return slide


def hold_coords(slide: FeatureFile) -> None:
    """Reads the coordinates now, so that later nothing of them is read; what goes wrong closes the slide."""
    try:
        coords = slide.read_stored_coords()
    except BaseException:
        slide.close()
        raise
    slide.load_coords = None if coords is None else lambda: coords
