"""From items to what training reads of them: features of capped slides, token ids, labels."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import jinja2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vllm_wsi.errors import SlideError
from vllm_wsi.model.chat_renderer import ChatRenderer, EncodedChat, last_answer
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.model.question_text import question_ids, question_text
from vllm_wsi.questions.items import QuestionError, SlideItem, SlideSource
from vllm_wsi.selection.chunk_reader import read_tensor_rows
from vllm_wsi.slides.encoder_names import Mismatch

from .slide_check import SLOW_FORMATS, SlideMemory, slow_reading
from .slide_reading import draw_from_strata, finite_rows, no_finite_patch

if TYPE_CHECKING:
    from .hard_selection import HardSelection


class TrainingSlide(NamedTuple):
    """A slide's patches as training sees them."""

    features: Tensor  # [n + s, d], the file's dtype; the last s are summary tokens
    indices: Tensor  # int64 [n], ascending: their rows among the N
    num_patches: int  # N
    num_candidates: int  # with a finite score, that these were chosen from; n where nothing was chosen
    num_summary: int = 0  # s


class TrainingItem(NamedTuple):
    slides: list[TrainingSlide]
    ids: list[int]
    labels: list[int]
    budget: int  # of slide positions: 0 packs them
    siblings: tuple[EncodedChat, ...] = ()  # further conversations about these slides, for the same sequence
    question: list[int] | None = None  # ids, for a scorer that hears them


class SlideDataset(Dataset):
    """Conversations about slides, one item each.

    What is random of an item is drawn by the seed, the item's number and the epoch alone: the same in every process and
    after a resume.

    Args:
        items: checked by `check`.
        renderer: of the checkpoint's tokenizer.
        config: of the checkpoint.
        max_patches: longer slides are cut into this many equal strata, and one patch of each is taken, another one in
            each epoch.
        stretch_positions: 0, or the length of slides that positions should be learned for: each slide's patches are
            placed, in their order, at random places of a longer slide of up to that many.
        mix_positions: half of the items get packed positions, whatever the checkpoint's mode.
        seed: of all this.
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
        self.selection: HardSelection | None = None  # of a hard stage: what it keeps of each slide
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change
        self._lengths: dict[SlideSource, int] = {}
        self._encoder_check = config.encoder_check()
        self._encoder_remarks: Counter[str] = Counter()
        self._slow: SlideSource | None = None

    def check(
        self, read: bool = True, encoder_mismatch: Mismatch = "refuse", memory: SlideMemory | None = None
    ) -> None:
        """Raises QuestionError, which names each item that training could not use; arguments as of `problems`."""
        if problems := self.problems(read, encoder_mismatch, memory):
            raise QuestionError(problems)

    def problems(
        self, read: bool = True, encoder_mismatch: Mismatch = "refuse", memory: SlideMemory | None = None
    ) -> list[str]:
        """Renders every conversation and opens every slide, once for all questions about it.

        Where the checkpoint records no encoder, the first slide that does says which one the others must have.

        Args:
            encoder_mismatch: "allow" takes slides of other encoders too.
            read: each slide is also read once through, which finds the truncated ones and those without a finite patch.
            memory: of slides that were looked at before.

        Returns:
            One sentence for each item that training could not use.
        """
        problems = []
        memory = memory or SlideMemory()
        self._encoder_check = self.config.encoder_check(encoder_mismatch)
        reasons: dict[SlideSource, str | None] = {}  # why a slide is of no use
        try:
            for item in tqdm(self.items, "checking items", disable=not os.isatty(2)):
                try:
                    ids = self.renderer.conversation(item).ids
                    if (found := ids.count(self.renderer.slide_token_id)) != len(item.slides):
                        raise ValueError(f"found {found} slide tokens in its text, wanted {len(item.slides)}")
                    if self._question(item) == []:
                        raise ValueError("found no text in its last question, wanted one, which the scorer hears")
                    for source in item.slides:
                        if source not in reasons:
                            reasons[source] = self._reason_against(source, read, memory)
                        if (reason := reasons[source]) is not None:
                            raise SlideError(reason)
                except (ValueError, jinja2.TemplateError) as error:
                    text = str(error)
                    problems.append(text if text.startswith(item.where) else f"{item.where}: {text}")
        finally:  # also what was read before an interrupt
            memory.save()
        return problems

    def _reason_against(self, source: SlideSource, read: bool, memory: SlideMemory) -> str | None:
        try:
            facts = memory.facts(source, read)
            if facts.feature_dim != self.config.feature_dim:
                return f"{facts.name}: found d = {facts.feature_dim}, wanted {self.config.feature_dim}"
            match = self._encoder_check.compare(facts.name, facts.encoder, facts.patch_um)
        except (OSError, ValueError) as error:
            return str(error)
        if match.remark is not None:
            self._encoder_remarks[match.remark] += 1
        if self._encoder_check.encoder is None:
            reason = "as the slides before it have"
            self._encoder_check = replace(self._encoder_check, encoder=match.features, reason=reason)
        self._lengths[source] = facts.num_patches
        if self._slow is None and facts.format in SLOW_FORMATS:
            self._slow = source
        return None

    def slow_reading(self) -> str | None:
        """What converting would save of each reading, measured on the first slide of a slow format that `problems`
        met; None where there is none."""
        try:
            return None if self._slow is None else slow_reading(self._slow, self.max_patches)
        except (OSError, SlideError):  # broken, and not read before: a step will say so, in whichever process meets it
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
            f"{max(long):,}): each epoch takes one of each of as many equal parts of them"
        )

    @property
    def epoch(self) -> int:
        """Counted from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """From here on, items are those of that epoch, in workers of a data loader too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> TrainingItem:
        item = self.items[number]
        rng = np.random.default_rng([self.seed, number, self.epoch])
        question = self._question(item)
        slides = [self._kept(source, rng, question) for source in item.slides]
        ids, labels = self.renderer.conversation(item)
        if question is not None:  # the patches are those of the last question
            labels = last_answer(labels)
        budget = 0 if self.mix_positions and rng.random() < 0.5 else self.config.slide_position_budget
        return TrainingItem(slides, ids, labels, budget, question=question)

    def _question(self, item: SlideItem) -> list[int] | None:
        if self.config.scorer["kind"] != "question":
            return None
        return question_ids(self.renderer.tokenizer, question_text([item.turns[-1][0]]))

    def _kept(self, source: SlideSource, rng: np.random.Generator, question: list[int] | None) -> TrainingSlide:
        if self.selection is None:
            return self._slide(source, rng)
        longest = 0 if self.stretch_positions else self.max_patches
        return self.selection.keep(source, lambda: self._slide(source, rng), longest, question)

    def _slide(self, source: SlideSource, rng: np.random.Generator) -> TrainingSlide:
        with source.open() as slide:
            n = slide.num_patches
            chosen = torch.from_numpy(draw_from_strata(self.max_patches, n, rng))
            features = read_tensor_rows(slide, chosen)
        finite = finite_rows(features)
        if not finite.any():
            raise SlideError(no_finite_patch(source.name))
        features, indices = features[finite], chosen[finite]
        if n < self.stretch_positions:
            n = int(math.exp(rng.uniform(math.log(n), math.log(self.stretch_positions))))
            indices = torch.from_numpy(np.sort(rng.choice(n, len(indices), replace=False)))
        return TrainingSlide(features, indices, n, len(features))
