"""What a checkpoint answers when different policies select what it sees: selections, answers, right or wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.questions.items import SLIDE_MARK, SlideItem
from vllm_wsi.selection.baselines import OraclePolicy, Selector
from vllm_wsi.selection.patch_matrix import finite_patches
from vllm_wsi.selection.selection import Selection
from vllm_wsi.selection.selection_measures import key_patch_recall, redundancy

from .answering import choose


@dataclass
class Judged:
    """The answers to all questions from one policy's selections; everything in the order of the questions."""

    correct: NDArray[np.bool_]  # [questions]
    key_patch_recall: NDArray[np.float64] | None  # [questions]; None where key patches are not known
    redundancy: NDArray[np.float64]  # [questions], mean over the slides of a question
    selections: list[list[Selection]] = field(repr=False, default_factory=list)  # one for each slide of a question


def key_patches_of(item: SlideItem) -> NDArray[np.int64] | None:
    """Rows of the patches that decide the answer, where the benchmark knows them."""
    return getattr(item.slides[0], "key_patches", None) if len(item.slides) == 1 else None


def select_all(
    items: Sequence[SlideItem], policies: Mapping[str, Selector], k: int
) -> dict[str, list[list[Selection]]]:
    """Every policy's selections of k patches, for each question one a slide; a slide is opened once for all policies.

    The policy "oracle" is added where the key patches of every question are known.
    """
    found: dict[str, list[list[Selection]]] = {name: [] for name in policies}
    for item in items:
        of_item: dict[str, list[Selection]] = {}
        for source in item.slides:
            with source.open() as slide:
                for name, policy in policies.items():
                    of_item.setdefault(name, []).append(policy.select(slide, k))
                if (rows := key_patches_of(item)) is not None:
                    of_item["oracle"] = [OraclePolicy(k, rows.tolist()).select(slide)]
        for name, selections in of_item.items():
            found.setdefault(name, []).append(selections)
    return {name: selections for name, selections in found.items() if len(selections) == len(items)}


def judge(
    model: SparseWSIForConditionalGeneration,
    renderer: ChatRenderer,
    items: Sequence[SlideItem],
    selections: list[list[Selection]],
    k: int,
) -> Judged:
    """Answers every question from these selections.

    Args:
        selections: for each question, one for each of its slides.
        k: the number of patches that a policy could keep, for the key-patch recall.
    """
    choices = choose(model, renderer, items, selections)
    recalls = []
    for item, chosen in zip(items, selections, strict=True):
        if (rows := key_patches_of(item)) is not None:
            recalls.append(key_patch_recall(chosen[0].indices.numpy(), rows, k))
    repeats = [np.mean([redundancy(one.features.float().numpy()) for one in chosen]) for chosen in selections]
    return Judged(
        np.array([choice.option == item.answer for choice, item in zip(choices, items, strict=True)]),
        np.array(recalls) if len(recalls) == len(items) else None,
        np.array(repeats),
        selections,
    )


def judge_blind(
    model: SparseWSIForConditionalGeneration, renderer: ChatRenderer, items: Sequence[SlideItem]
) -> NDArray[np.bool_]:
    """Whether each question is answered right without any slide."""
    blind = [
        SlideItem(item.where, (), ((item.question.replace(SLIDE_MARK, "").lstrip("\n"), item.answer),), item.options)
        for item in items
    ]
    choices = choose(model, renderer, blind, [[] for _ in blind])
    return np.array([choice.option == item.answer for choice, item in zip(choices, items, strict=True)])


def best_constant(items: Iterable[SlideItem]) -> tuple[str, NDArray[np.bool_]]:
    """(the letter that is right most often, whether it is right for each question)."""
    answers = [item.answer for item in items]
    letter = max(sorted(set(answers)), key=answers.count)
    return letter, np.array([answer == letter for answer in answers])


def with_positions(model: SparseWSIForConditionalGeneration, mode: str) -> SparseWSIForConditionalGeneration:
    """The same weights under another position mode."""
    other = copy.copy(model)
    other.config = copy.deepcopy(model.config)
    other.config.position_ids = mode
    return other


def kept_and_dropped_means(items: Sequence[SlideItem], selections: list[list[Selection]]) -> tuple[NDArray, NDArray]:
    """(mean features of the kept patches, mean features of the dropped patches), each [slides, d].

    Patches with NaN or infinities count in neither; a slide of which nothing finite was dropped is left out.
    """
    kept, dropped = [], []
    for item, chosen in zip(items, selections, strict=True):
        for source, selection in zip(item.slides, chosen, strict=True):
            with source.open() as slide:
                patches, _ = finite_patches(slide)
            is_kept = torch.isin(patches.rows, selection.indices)
            if not is_kept.all():
                kept.append(patches.features[is_kept].double().mean(dim=0).numpy())
                dropped.append(patches.features[~is_kept].double().mean(dim=0).numpy())
    return np.array(kept), np.array(dropped)
