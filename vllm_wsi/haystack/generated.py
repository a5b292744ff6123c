"""What the makers of virtual slides share: worlds from a recipe's arguments, and lengths of slides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from vllm_wsi.errors import SettingsError

World = TypeVar("World")


def made_world(kind: type[World], name: str, arguments: Mapping[str, Any]) -> World:
    """A world of a recipe's arguments.

    Args:
        kind: a dataclass.
        name: of its generator, for errors.

    Raises:
        SettingsError: an argument that it does not have, or a value out of range.
    """
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    if unknown := arguments.keys() - {*known}:
        raise SettingsError(f"{name}: found {', '.join(sorted(unknown))}, wanted some of {', '.join(known)}")
    return kind(**arguments)


def length_of(number: int, num_patches: int | tuple[int, int]) -> int:
    """N of the slide of that number: `num_patches`, or drawn between the two."""
    if isinstance(num_patches, int):
        return num_patches
    return int(np.random.default_rng([number, 11]).integers(*num_patches, endpoint=True))
