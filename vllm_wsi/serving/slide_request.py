"""What is asked of a slide, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_wsi.errors import SlideError
from vllm_wsi.selection.question_selection import Question
from vllm_wsi.selection.selection import Selection
from vllm_wsi.slides import FeatureFile, SlideIdentity, open_features
from vllm_wsi.store.selection_key import SelectionKey
from vllm_wsi.store.stored_selector import Source


@dataclass(frozen=True)
class SlideRequest:
    """One slide of one request: a path, an open file (which the service then closes), or the state that another machine
    tells of a slide, which perhaps need not be opened."""

    path: Path | None = None
    slide: FeatureFile | None = None
    k: int | None = None  # None: the server's K
    encoder: str | None = None  # which features, where a file holds several
    question: str | None = None  # that the patches are chosen for, by a checkpoint whose scorer hears it
    keep_all_scores: bool = False  # for a heat map: scores and places of all patches
    told: SlideIdentity | None = None  # by the other machine
    open_told: Callable[[], FeatureFile] | None = None  # None: it cannot be opened there

    @property
    def name(self) -> str:
        """Of the file, without its folder."""
        if self.slide is not None:
            return self.slide.name
        if self.told is not None:
            return self.told.path.partition("?")[0].rpartition("/")[2]
        return "" if self.path is None else self.path.name

    def identity(self) -> SlideIdentity:
        """Costs one stat for a path. Raises SlideError where there is no file."""
        if self.slide is not None:
            return self.slide.identity
        if self.told is not None:
            return self.told
        assert self.path is not None
        return SlideIdentity.of_file(self.path)

    def digest(self, key: SelectionKey, k: int, question: Question | None) -> str:
        """Of the selection that is asked for; one with the scores of all patches is another one."""
        return key.of_selection(k, None if question is None else question.digest) + (
            "-all-scores" if self.keep_all_scores else ""
        )

    def open(self) -> FeatureFile:
        if self.slide is not None:
            return self.slide
        if self.open_told is not None:
            return self.open_told()
        if self.path is None:
            raise SlideError(f"{self.name}: found what its server tells of it alone, wanted its URL once more")
        return open_features(self.path, self.encoder)

    def close(self) -> None:
        """Closes the open file, where there is one."""
        if self.slide is not None:
            self.slide.close()


@dataclass(frozen=True)
class SelectedSlide:
    """A finished selection, and what it was made of."""

    selection: Selection
    digest: str  # of slide identity, K, encoder, scorer and device: equal digests mean equal selections
    scorer: str  # digest of the scorer's weights, and the rule for encoders
    default_k: int  # the K of the service that selected
    request: SlideRequest | None  # None where the slide came by value and is gone
    source: Source | Literal["memory"] = "file"

    @property
    def num_bytes(self) -> int:
        chosen = self.selection
        coords = 0 if chosen.coords is None else chosen.coords.nbytes
        metadata = sum(len(key) + len(value) for key, value in chosen.metadata.items())
        everything = 0 if chosen.all_scores is None else chosen.all_scores.nbytes
        for tensor in (chosen.all_coords, chosen.pools, chosen.pooled):
            everything += 0 if tensor is None else tensor.nbytes
        kept = chosen.indices.nbytes + chosen.scores.nbytes + chosen.features.nbytes
        return kept + coords + everything + metadata + 1024
