"""Questions grouped by the length of their slides: a study's tables have a row for each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_wsi.questions.items import SlideItem
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
