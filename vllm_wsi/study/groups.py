"""The questions of a study: in groups by the length of their slides, a row of a table each, and which share a slide."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_wsi.questions.finder import FeaturePath
from vllm_wsi.questions.items import SlideItem, SlideSource
from vllm_wsi.questions.length_bins import LENGTH_BINS, length_bin

Groups = Mapping[str, Sequence[SlideItem]]
"""Name of a group, say a length or a bin of lengths -> its questions; the shortest slides first."""


def by_length(items: Sequence[SlideItem]) -> dict[str, list[SlideItem]]:
    """Questions in the bins of slide length of the paper's figure (`LENGTH_BINS`); empty bins are left out."""
    groups: dict[str, list[SlideItem]] = {name: [] for name in LENGTH_BINS}
    for item in items:
        groups[length_bin(longest_slide(item))].append(item)
    return {name: members for name, members in groups.items() if members}


def longest_slide(item: SlideItem) -> int:
    """The number of patches of an item's longest slide; a slide that does not tell it unopened is opened."""
    lengths = []
    for source in item.slides:
        known = getattr(source, "num_patches", None)
        if known is None:
            with source.open() as slide:
                known = slide.num_patches
        lengths.append(known)
    return max(lengths)


def slide_names(groups: Groups) -> dict[str, list[str]]:
    """For each question of each group its first slide, by a name that no other slide of these groups has.

    Files are one slide if they are one file, links followed. A file has its own name, with as many of the folders
    around it as other slides of that name make needful; a slide in memory has its name.
    """
    called: dict[Path, Path] = {}
    keys = {name: [_place(item.slides[0], called) for item in items] for name, items in groups.items()}
    namesakes: dict[str, list[Path]] = defaultdict(list)
    for place, path in called.items():
        namesakes[path.name].append(place)
    names: dict[Path, str] = {}
    for places in namesakes.values():
        depth = 1
        while len({called[place].parts[-depth:] for place in places}) < len(places):
            depth += 1
        names |= {place: Path(*called[place].parts[-depth:]).as_posix() for place in places}
    return {name: [names[place] for place in places] for name, places in keys.items()}


def _place(source: SlideSource, called: dict[Path, Path]) -> Path:
    """What tells a slide from others; notes in `called` the path by which it was asked for first."""
    path = source.path.absolute() if isinstance(source, FeaturePath) else Path(source.name)
    place = path.resolve() if isinstance(source, FeaturePath) else path
    called.setdefault(place, path)
    return place
