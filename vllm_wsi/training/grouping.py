"""Questions about the same slides in one sequence: the forward pass over the patches is made once for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vllm_wsi.questions.items import SlideItem

from .dataset import SlideDataset, TrainingItem


class GroupedDataset(Dataset):
    """The items of a dataset, several to a sequence.

    Items go together where they are about the same slides, in the same order, and where their token ids are the same
    up to the last slide token. Others stay alone: a conversation whose slide stands behind its question, one without a
    slide. Which ones go together is drawn anew in each epoch; the number of sequences stays the same.

    What is random in reading (rows of a long slide, stretched or mixed positions) is drawn once for a sequence, as its
    first item would draw it.

    Args:
        dataset: whose items are grouped.
        questions_per_sequence: at most; a slide's items are spread evenly over as few sequences as hold them.
        seed: of the draw, together with the epoch.
    """

    def __init__(self, dataset: SlideDataset, questions_per_sequence: int, seed: int = 0) -> None:
        self.dataset, self.questions_per_sequence, self.seed = dataset, questions_per_sequence, seed
        alike: dict[Any, list[int]] = {}
        for number, item in enumerate(dataset.items):
            alike.setdefault(self._beginning(item) or number, []).append(number)
        self._alike = list(alike.values())
        self._drawn_for = -1

    def _beginning(self, item: SlideItem) -> tuple[Any, ...] | None:
        """What items must have in common to share a sequence; None for one that must stay alone."""
        ids = self.dataset.renderer.question(item)
        slide_token_id = self.dataset.renderer.slide_token_id
        length = max((place + 1 for place, token in enumerate(ids) if token == slide_token_id), default=0)
        # The token that predicts the answer must not be the prefix's last: each branch has its own.
        return (item.slides, *ids[:length]) if 0 < length < len(ids) else None

    def set_epoch(self, epoch: int) -> None:
        """From here on, sequences and the items in them are those of that epoch, in workers of a data loader too."""
        self.dataset.set_epoch(epoch)

    def _counts(self) -> list[int]:
        """How many sequences hold each set of items that are alike."""
        return [-(-len(numbers) // self.questions_per_sequence) for numbers in self._alike]

    def _sequences(self) -> list[list[int]]:
        """Item numbers of each sequence of this epoch."""
        if (epoch := self.dataset.epoch) != self._drawn_for:
            rng = np.random.default_rng([self.seed, epoch])
            pairs = zip(self._alike, self._counts(), strict=True)
            split = [np.array_split(rng.permutation(numbers), count) for numbers, count in pairs]
            self._drawn = [part.tolist() for parts in split for part in parts]
            self._drawn_for = epoch
        return self._drawn

    def summary(self) -> str:
        """In one sentence, how many questions share a sequence."""
        most = self.questions_per_sequence
        return f"{len(self.dataset):,} conversations go in {len(self):,} sequences of up to {most:,}"

    def __len__(self) -> int:
        return sum(self._counts())

    def __getitem__(self, number: int) -> TrainingItem:
        first, *others = self._sequences()[number]
        renderer, items = self.dataset.renderer, self.dataset.items
        return self.dataset[first]._replace(siblings=tuple(renderer.conversation(items[other]) for other in others))
