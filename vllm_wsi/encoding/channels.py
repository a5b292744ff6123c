"""Which three channels of a picture are taken for red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_wsi.errors import SlideError

RGB = ("Red", "Green", "Blue")
MAX_NAMED = 12  # channels that an error lists
MAX_NAME = 40  # characters of each


class ChannelError(SlideError):
    """Other channels than are wanted; begins with what was found, `open_image` names the file."""


def check_rgb(wanted: Sequence[str]) -> None:
    """Raises ChannelError unless an RGB picture's own channels are named in their own order."""
    if pick_channels(wanted, RGB) != (0, 1, 2):
        raise ChannelError(f"--channels {','.join(wanted)}, wanted Red,Green,Blue, which this picture has")


def pick_channels(wanted: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    """Places of three channels, each given by its name in any case, or by its number from 0.

    Raises:
        ChannelError: not three, or no such channel, or a name that several have.
    """
    if len(wanted) != 3:
        raise ChannelError(f"--channels with {len(wanted)} of them, wanted three of {listed(names)}")
    return tuple(_place(text, names) for text in wanted)


def _place(text: str, names: Sequence[str]) -> int:
    same = [i for i, name in enumerate(names) if name.casefold() == text.strip().casefold()]
    if len(same) > 1:
        raise ChannelError(f"--channels {text!r}, which {len(same)} channels are called, wanted its number from 0")
    if same:
        return same[0]
    if text.strip().isdecimal() and int(text) < len(names):
        return int(text)
    raise ChannelError(f"--channels {text!r}, wanted three of {listed(names)}, or numbers from 0 to {len(names) - 1}")


def listed(names: Sequence[str]) -> str:
    shown = ", ".join(name[:MAX_NAME] for name in names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown}, ..."


def is_rgb(names: Sequence[str]) -> bool:
    """Whether three separate planes say of themselves that they are one colour picture."""
    said = [name.strip().casefold() for name in names]
    return said == [name.casefold() for name in RGB] or said == [name[0].casefold() for name in RGB]
