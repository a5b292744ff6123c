"""From items to what training reads of them: features of capped slides, token ids, labels."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jinja2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vllm_wsi.errors import SlideError
from vllm_wsi.model.chat_renderer import ChatRenderer, EncodedChat
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.questions.items import QuestionError, SlideItem, SlideSource
from vllm_wsi.selection.chunk_reader import ChunkStager
from vllm_wsi.selection.evenly_spaced import evenly_spaced
from vllm_wsi.slides.encoder_names import EncoderCheck, Mismatch

CPU = torch.device("cpu")


class TrainingSlide(NamedTuple):
    """A slide's patches as training sees them."""

    features: Tensor  # [n, d], the file's dtype
    indices: Tensor  # int64 [n], ascending: their rows among the N
    num_patches: int  # N


class TrainingItem(NamedTuple):
    slides: list[TrainingSlide]
    ids: list[int]
    labels: list[int]
    budget: int  # of slide positions: 0 packs them
    siblings: tuple[EncodedChat, ...] = ()  # further conversations about these slides, for the same sequence


class SlideDataset(Dataset):
    """Conversations about slides, one item each.

    Args:
        items: checked by `check`.
        renderer: of the checkpoint's tokenizer.
        config: of the checkpoint.
        max_patches: longer slides are thinned to this many evenly spaced patches.
        stretch_positions: 0, or the length of slides that positions should be learned for: each slide's patches are
            placed, in their order, at random places of a longer slide of up to that many.
        mix_positions: half of the items get packed positions, whatever the checkpoint's mode.
        seed: of what is random above, together with the item's number.
    """

    def __init__(
        self,
        items: Sequence[SlideItem],
        renderer: ChatRenderer,
        config: SparseWSIConfig,
        max_patches: int,
        stretch_positions: int = 0,
        mix_positions: bool = False,
        seed: int = 0,
    ) -> None:
        self.items, self.renderer, self.config = items, renderer, config
        self.max_patches, self.stretch_positions = max_patches, stretch_positions
        self.mix_positions, self.seed = mix_positions, seed
        self._lengths: dict[SlideSource, int] = {}
        self._encoder_check = EncoderCheck(config.encoder)
        self._encoder_remarks: Counter[str] = Counter()

    def check(self, read: bool = True, encoder_mismatch: Mismatch = "refuse") -> None:
        """Renders every conversation and opens every slide, once for all questions about it.

        Where the checkpoint records no encoder, the first slide that does says which one the others must have.

        Args:
            encoder_mismatch: "allow" takes slides of other encoders too.
            read: each slide is also read once through, which finds the truncated ones and those without a finite patch.

        Raises:
            QuestionError: names each item that training could not use.
        """
        problems = []
        self._encoder_check = EncoderCheck(self.config.encoder, encoder_mismatch)
        reasons: dict[SlideSource, str | None] = {}  # why a slide is of no use
        for item in tqdm(self.items, "checking items", disable=not os.isatty(2)):
            try:
                ids = self.renderer.conversation(item).ids
                if (found := ids.count(self.renderer.slide_token_id)) != len(item.slides):
                    raise ValueError(f"found {found} slide tokens in its text, wanted {len(item.slides)}")
                for source in item.slides:
                    if source not in reasons:
                        reasons[source] = self._reason_against(source, read)
                    if (reason := reasons[source]) is not None:
                        raise SlideError(reason)
            except (ValueError, jinja2.TemplateError) as error:
                text = str(error)
                problems.append(text if text.startswith(item.where) else f"{item.where}: {text}")
        if problems:
            raise QuestionError(problems)

    def _reason_against(self, source: SlideSource, read: bool) -> str | None:
        try:
            with source.open() as slide:
                if slide.feature_dim != self.config.feature_dim:
                    return f"{slide.name}: found d = {slide.feature_dim}, wanted {self.config.feature_dim}"
                match = self._encoder_check(slide.name, slide.metadata)
                if match.remark is not None:
                    self._encoder_remarks[match.remark] += 1
                if self._encoder_check.encoder is None:
                    reason = "as the slides before it have"
                    self._encoder_check = replace(self._encoder_check, encoder=match.features, reason=reason)
                self._lengths[source] = slide.num_patches
                if read:
                    finite = [bool(finite_rows(chunk).any()) for _, chunk in ChunkStager(slide, CPU).chunks()]
                    return None if any(finite) else _no_finite_patch(source)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def encoder_remarks(self) -> list[str]:
        """Slides whose encoder `check` could not compare, or was told to allow; one sentence each."""
        return [f"{count:,} slides: {remark}" for remark, count in self._encoder_remarks.items()]

    def thinning(self) -> str | None:
        """What `max_patches` takes away, in one sentence; None where it takes nothing. Knows the slides that `check`
        has opened, and those that tell their length unopened."""
        sources = {source for item in self.items for source in item.slides}
        lengths = [self._lengths.get(source, getattr(source, "num_patches", 0)) for source in sources]
        long = [n for n in lengths if n > self.max_patches]
        if not long:
            return None
        return (
            f"{len(long):,} of {len(lengths):,} slides have more than {self.max_patches:,} patches (the longest "
            f"{max(long):,}) and are thinned to as many, evenly spaced"
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> TrainingItem:
        item = self.items[number]
        rng = np.random.default_rng([self.seed, number])
        slides = [self._slide(source, rng) for source in item.slides]
        ids, labels = self.renderer.conversation(item)
        budget = 0 if self.mix_positions and rng.random() < 0.5 else self.config.slide_position_budget
        return TrainingItem(slides, ids, labels, budget)

    def _slide(self, source: SlideSource, rng: np.random.Generator) -> TrainingSlide:
        with source.open() as slide:
            n = slide.num_patches
            chosen = evenly_spaced(self.max_patches, n)
            features = torch.empty((len(chosen), slide.feature_dim), dtype=getattr(torch, slide.dtype))
            for start, chunk in ChunkStager(slide, CPU).chunks():
                inside = (chosen >= start) & (chosen < start + len(chunk))
                features[inside] = chunk[chosen[inside] - start]
        finite = finite_rows(features)
        if not finite.any():
            raise SlideError(_no_finite_patch(source))
        features, indices = features[finite], chosen[finite]
        if n < self.stretch_positions:
            n = int(math.exp(rng.uniform(math.log(n), math.log(self.stretch_positions))))
            indices = torch.from_numpy(np.sort(rng.choice(n, len(indices), replace=False)))
        return TrainingSlide(features, indices, n)


def _no_finite_patch(source: SlideSource) -> str:
    return f"{source.name}: found no patch with finite features, wanted at least one"


def finite_rows(features: Tensor) -> Tensor:
    """bool [n] of [n, d]: the patches without NaN and infinities."""
    return torch.isfinite(features).all(dim=1)
