"""Channels of a slide image by name or number."""

from __future__ import annotations

from collections.abc import Sequence

from .features import SlideError

RGB_NAMES = (("red", "green", "blue"), ("r", "g", "b"))
"""What separate channels are called that are a picture's red, green and blue, in lower case."""


def pick_channels(names: Sequence[str], chosen: str) -> tuple[int, ...]:
    """Three channels by name or number; "DAPI,CD8,CD3" or "0,1,2".

    Raises:
        SlideError: there is no such channel, or other than three are named.
    """
    known = {name.lower(): i for i, name in enumerate(names)} | {str(i): i for i in range(len(names))}
    wanted = [part.strip().lower() for part in chosen.split(",")]
    if len(wanted) != 3 or any(part not in known for part in wanted):
        raise SlideError(f"the channels {', '.join(names)}, not three of them by --channels {chosen}")
    return tuple(known[part] for part in wanted)
