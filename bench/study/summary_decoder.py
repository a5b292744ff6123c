"""A small decoder that learns to read what an arm of `summary_arms.py` shows of each slide, and answers from it.

Shared by `bench.study.summary_tokens` (virtual slides) and `bench.study.tissue_summary` (real tiles).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from vllm_wsi.model.chat_renderer import ChatRenderer, EncodedChat
from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.stats import Interval, mean_interval, paired_interval
from vllm_wsi.training.batches import collate
from vllm_wsi.training.dataset import TrainingItem, TrainingSlide
from vllm_wsi.training.model import SparseLearnModel

from .summary_arms import Arm, K, Shown, with_counts

BATCH, WARMUP, RATE, LEAST_RATE = 32, 50, 1e-3, 0.05
RENDERED: WeakKeyDictionary[ChatRenderer, dict[tuple[tuple[str, str], ...], EncodedChat]] = WeakKeyDictionary()
"""The few different conversations, which are rendered once for each tokenizer."""
MEASURES = ("accuracy", "accuracy_low", "accuracy_high", "less_k_best", "less_low", "less_high")


class AskedSlide(Protocol):
    """A slide with one question about it."""

    def item(self) -> SlideItem: ...


S = TypeVar("S", bound=AskedSlide)


def settings(feature_dim: int, texts: tuple[str, ...]) -> TinySettings:
    """Of the decoder, for slides of that d: two further inputs may tell how many patches a token stands for."""
    return TinySettings(
        feature_dim=feature_dim + 2, scorer_hidden_size=0, num_slide_tokens=K, position_ids="packed", rope_theta=1e6,
        initializer_range=0.05, texts=texts,
    )  # fmt: skip


class Slides:
    """Questions about slides, and what arms show of them.

    Args:
        shown: of each arm, tokens fp16 [slides, K, d] and counts fp32 [slides, K].
    """

    def __init__(self, items: list[SlideItem], shown: Mapping[Arm, tuple[Tensor, Tensor]]) -> None:
        self.items, self._shown = items, shown

    @classmethod
    def made(
        cls, paths: Mapping[Arm, Path], slides: Sequence[S], show: Callable[[int, S, Sequence[Arm]], list[Shown]]
    ) -> Slides:
        """Reads the tokens of each arm from its path; those that are not there are made, and kept there.

        Args:
            show: (number of the slide, the slide, arms) -> what each of these arms shows of it.
        """
        if missing := [arm for arm, path in paths.items() if not path.exists()]:
            found = [
                [(one.tokens.half(), one.counts) for one in show(number, slide, missing)]
                for number, slide in enumerate(slides)
            ]
            for of_arm, arm in zip(zip(*found, strict=True), missing, strict=True):
                tokens, counts = map(torch.stack, zip(*of_arm, strict=True))
                torch.save((tokens, counts), paths[arm])
        return cls([slide.item() for slide in slides], {arm: torch.load(path) for arm, path in paths.items()})

    def of_arm(self, arm: Arm) -> Tensor:
        """fp32 [slides, K, d + 2]."""
        tokens, counts = self._shown[arm]
        return with_counts(tokens.float(), counts, arm.told)


def trained(
    arm: Arm, slides: Slides, new: TinySettings, steps: int, seed: int
) -> tuple[SparseLearnModel, ChatRenderer]:
    """A new projector and decoder that learned from what the arm shows.

    Args:
        new: what they are like, but for the seed.
        seed: of the first weights and of the order of the slides.
    """
    made, tokenizer = new_model(new.changed(seed=seed))
    made.projector.input_norm = False  # what is shown is normalised, and the two numbers behind it shall stay
    model, renderer = SparseLearnModel(made, None).train(), ChatRenderer(tokenizer)
    learning = [*made.projector.parameters(), *made.language_model.parameters()]
    optimiser = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.01)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_after(step, steps))
    tokens, rng = slides.of_arm(arm), np.random.default_rng([seed, 10])
    order = np.concatenate([rng.permutation(len(tokens)) for _ in range(math.ceil(steps * BATCH / len(tokens)))])
    for step in range(steps):
        numbers = order[step * BATCH : (step + 1) * BATCH]
        loss = model(**batch_of(renderer, [slides.items[one] for one in numbers], tokens[numbers]))["loss"]
        optimiser.zero_grad()
        loss.backward()
        clip_grad_norm_(learning, 1.0)
        optimiser.step()
        cosine.step()
        if step % 100 == 99:
            print(f"{arm.name} {arm.s}, seed {seed}, step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval(), renderer


def rate_after(step: int, steps: int) -> float:
    """Of `RATE`: a short warm-up, then a cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    turn = (step - WARMUP) / max(1, steps - WARMUP)
    return LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * turn)) / 2


def batch_of(renderer: ChatRenderer, items: Sequence[SlideItem], tokens: Tensor) -> dict[str, Tensor]:
    """One batch at packed positions: the S tokens stand right behind the patches, as patches would."""
    made, rendered = [], RENDERED.setdefault(renderer, {})
    for item, one in zip(items, tokens, strict=True):
        if item.turns not in rendered:
            rendered[item.turns] = renderer.conversation(item)
        ids, labels = rendered[item.turns]
        made.append(TrainingItem([TrainingSlide(one, torch.arange(K), K, K)], ids, labels, budget=0))
    return collate(made, renderer.slide_token_id, renderer.tokenizer.eos_token_id)


@torch.no_grad()
def answered(model: SparseLearnModel, renderer: ChatRenderer, arm: Arm, slides: Slides) -> NDArray[np.bool_]:
    """[questions]: whether the right option's first token is the likeliest of all options'."""
    tokens, right = slides.of_arm(arm), []
    for start in range(0, len(tokens), 4 * BATCH):
        items = slides.items[start : start + 4 * BATCH]
        logits, labels = model.tail_logits(**batch_of(renderer, items, tokens[start : start + 4 * BATCH]))
        first = (labels >= 0).int().argmax(dim=1)
        for row, item in enumerate(items):
            options = list(item.options)
            found = logits[row, first[row], renderer.first_ids(options)]
            right.append(options[int(found.argmax())] == item.answer)
    return np.array(right)


def measures(right: NDArray[np.bool_], best: NDArray[np.bool_] | None, units: ArrayLike) -> dict[str, float | str]:
    """The columns of `MEASURES`: the accuracy, and what it is less that of K best patches, with their intervals.

    Args:
        right: [seeds, questions].
        best: the same of K best patches alone; None: there is nothing to compare with.
        units: [questions], what is independent: the number of the slide, or of where its tiles are from.
    """
    groups = np.broadcast_to(units, right.shape).ravel().tolist()
    accuracy = mean_interval(right.ravel(), groups)
    less: Interval | tuple[str, ...] = ("", "", "")
    if best is not None:
        less = paired_interval(right.ravel(), best.ravel(), groups)
    values = [round(one, 4) if isinstance(one, float) else one for one in (*accuracy, *less)]
    return dict(zip(MEASURES, values, strict=True))
