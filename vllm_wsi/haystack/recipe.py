"""How haystack is trained on and asked: the demo checkpoint and its recipe, and questions by slide length."""

from __future__ import annotations

from pathlib import Path

from vllm_wsi.errors import SettingsError
from vllm_wsi.questions.items import SlideItem

from .generator import HaystackWorld, haystack_items
from .topics import topic_items

DEMO_CHECKPOINT = Path(__file__).with_name("demo_checkpoint")
"""The trained checkpoint in this package, made by `vllm-wsi train haystack --out DIR` (seed 0).

It answers questions about haystack's virtual slides alone.
"""

CALIBRATE_HAYSTACK = Path(__file__).with_name("calibrate_haystack.yaml")
"""What the demo checkpoint's calibration was fitted to."""

GENERATORS = {"haystack": haystack_items, "topics": topic_items}
"""Makers of questions that a training recipe calls by name (`generate: {name: haystack, ...}`)."""


def recipe(config: str) -> Path:
    """The YAML file of a training run.

    Args:
        config: a path, or "haystack" for the recipe that made the demo checkpoint.
    """
    return Path(__file__).with_name("haystack.yaml") if config == "haystack" else Path(config)


def groups_of_length(slides: str, world: HaystackWorld, split: str = "test") -> dict[str, list[SlideItem]]:
    """Slide length -> questions about slides of that length.

    Args:
        slides: "N:COUNT" for each length, such as "1000:192,100000:24": one question about each of COUNT slides of N
            patches.

    Raises:
        SettingsError: `slides` is no such list.
    """
    groups = {}
    for part in slides.split(","):
        length, _, count = part.partition(":")
        if not (length.isdigit() and count.isdigit() and int(length) and int(count)):
            raise SettingsError(f"slides: found {part!r}, wanted N:COUNT")
        groups[f"{int(length)}"] = world.items(split, int(count), int(length))
    return groups
