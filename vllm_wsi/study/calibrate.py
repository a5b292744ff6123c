"""Fits `Calibration` to a checkpoint: temperature and sufficiency on validation, usual scores on training slides."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from transformers import AutoTokenizer

from vllm_wsi.errors import SettingsError, needs_extra
from vllm_wsi.files import write_atomically
from vllm_wsi.model.chat_renderer import ChatRenderer
from vllm_wsi.model.checkpoint import CALIBRATION, loading
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.model.question_text import question_ids, question_text
from vllm_wsi.questions.items import SlideItem
from vllm_wsi.selection.calibration import TRAINING_LEVELS, Calibration, UsualScores, distances
from vllm_wsi.selection.score_summary import ScoreSummary, sampled_scores
from vllm_wsi.selection.scorer import scorer_digest
from vllm_wsi.selection.selection import Selection
from vllm_wsi.settings import Settings
from vllm_wsi.training.settings import DataSettings, read_yaml

from .answering import choose

logger = logging.getLogger(__name__)

SHOWS_ENOUGH = 0.95
"""Share of the validation slides with evidence whose sufficiency is at least `Calibration.enough`."""
SAMPLED = 2048
"""Scores of each training slide that the usual scores are taken from."""
KEPT_DISTANCES = 200
"""Of validation slides: so many tell p-values down to 1 / 201."""
GROUP_SLIDES = 200
"""Validation slides of about one length, from which on they are compared with one another alone."""
MAX_GROUPS = 4
DIGITS = 5
"""Decimals of what is stored of scores and distances."""
MAX_LOG_TEMPERATURE = 3.0
RIDGE = 1e-3
"""On the weights of the logistic fit, which would otherwise not be determined where all lengths are equal."""


class CalibrateSettings(Settings):
    """The YAML file of `vllm-wsi calibrate`."""

    training: list[DataSettings] = Field(min_length=1)
    """Slides as those that the scorer was trained on."""
    validation: list[DataSettings] = Field(min_length=1)
    """Multiple-choice questions, each about one slide, that no training and no test sees; of all lengths that are
    served, as the scores of short slides vary more."""
    absent: str
    """Text of the option that is right where the slide does not show what is asked for."""


def load_calibrate_settings(path: Path) -> CalibrateSettings:
    """Reads a YAML file; paths in it are relative to it.

    Raises:
        SettingsError: the file is no YAML, or one sentence for each key that does not fit.
    """
    settings = CalibrateSettings.of(read_yaml(path), str(path))
    for data in (*settings.training, *settings.validation):
        data.place_beside(path)
    return settings


class ReadAnswer(NamedTuple):
    """One validation question, its slide selected and its answer read."""

    selection: Selection
    logprobs: NDArray[np.float64]  # over the options
    right: int  # place of the right option
    shows: bool  # whether the slide shows what is asked for


def calibrate(
    checkpoint: Path, training: Sequence[SlideItem], validation: Sequence[SlideItem], absent: str
) -> tuple[Calibration, Path]:
    """Writes `calibration.json` into a checkpoint's directory; returns what it holds, and its path.

    Args:
        training: questions about slides as those that the scorer was trained on; their slides alone count.
        validation: multiple-choice questions that neither training nor any test sees, about one slide each.
        absent: the text of the option that is right where a slide does not show what is asked for. Questions with and
            without such an answer are needed.

    Raises:
        SettingsError: no training slide, too few questions, or all of them with the same kind of answer.
        CheckpointError, SlideError: the checkpoint or a slide cannot be used.
    """
    name = str(checkpoint)
    with loading(name):
        model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint).eval()
        renderer = ChatRenderer(AutoTokenizer.from_pretrained(checkpoint))
    asked = ask(model, renderer, validation, absent)
    found = fitted(scorer_digest(model.selector().scorer), sampled_slides(model, training), asked)
    path = checkpoint / CALIBRATION
    write_atomically(path, (found.model_dump_json(indent=1) + "\n").encode())
    return found, path


def ask(
    model: SparseWSIForConditionalGeneration, renderer: ChatRenderer, items: Sequence[SlideItem], absent: str
) -> list[ReadAnswer]:
    """Selects and answers every question.

    Raises:
        SettingsError: a question without options, or about other than one slide.
    """
    for item in items:
        if len(item.slides) != 1 or not item.options:
            raise SettingsError(f"{item.where}: found no question of choice about one slide, wanted only such")
    selections = [selected(model, renderer, item) for item in items]
    choices = choose(model, renderer, items, [[one] for one in selections])
    return [
        ReadAnswer(
            selection,
            np.array([choice.logprobs[option] for option in item.options]),
            list(item.options).index(item.answer),
            item.options[item.answer] != absent,
        )
        for item, selection, choice in zip(items, selections, choices, strict=True)
    ]


@torch.no_grad()
def selected(model: SparseWSIForConditionalGeneration, renderer: ChatRenderer, item: SlideItem) -> Selection:
    """The selection of an item's first slide, for its question where the scorer hears it."""
    with item.slides[0].open() as slide:
        return model.selector().select(slide, query=question_query(model, renderer, item))


@torch.no_grad()
def question_query(
    model: SparseWSIForConditionalGeneration, renderer: ChatRenderer, item: SlideItem
) -> torch.Tensor | None:
    """fp32 [R], what a scorer that hears the question makes of an item's first one; None for other scorers."""
    return model.query(torch.tensor(question_ids(renderer.tokenizer, question_text([item.question]))))


class SampledSlide(NamedTuple):
    """Some scores of one training slide."""

    num_patches: int
    scores: NDArray[np.float32]  # at most `SAMPLED`


def sampled_slides(model: SparseWSIForConditionalGeneration, items: Sequence[SlideItem]) -> list[SampledSlide]:
    """Scores of training slides, of each as many.

    Raises:
        SettingsError: there is no slide.
    """
    selector, sampled = model.selector(), []
    for item in items:
        for source in item.slides:
            with source.open() as slide:  # without a question: these scores are the same whatever is asked
                scores = selector.select(slide, keep_all_scores=True).all_scores
            assert scores is not None
            sampled.append(SampledSlide(len(scores), sampled_scores(scores, SAMPLED).numpy()))
    if not sampled:
        raise SettingsError("training: found no slide, wanted some")
    return sampled


def fitted(scorer: str, training: Sequence[SampledSlide], asked: Sequence[ReadAnswer]) -> Calibration:
    """The calibration that these answers give.

    Raises:
        SettingsError: all slides show what is asked for, or none does.
    """
    shows = np.array([one.shows for one in asked])
    if len(set(shows.tolist())) < 2:
        found = f"{int(shows.sum())} of {len(shows)}" if len(shows) else "no question"
        raise SettingsError(f"validation: found {found} whose slide shows what is asked for, wanted some and not all")
    summaries = [one.selection.summary for one in asked]
    assert all(summary is not None for summary in summaries)
    known = [summary for summary in summaries if summary is not None]
    patches = np.array([one.selection.num_patches for one in asked])
    weights = logistic_fit(np.stack([[one.best for one in known], np.log(patches)], axis=1), shows)
    temperature = temperature_fit([one.logprobs for one in asked], [one.right for one in asked])
    if abs(math.log(temperature)) > 0.999 * MAX_LOG_TEMPERATURE:
        logger.warning(
            "validation: temperature: found %.2f, an end of the range that is searched: the first tokens of options "
            "hardly tell which answer is right, so a confidence will say little", temperature,
        )  # fmt: skip
    values: dict[str, Any] = {
        "scorer": scorer,
        "temperature": temperature,
        **dict(zip(("best_weight", "log_patches_weight", "bias"), weights, strict=True)),
        "usual": usual_scores(training, known, patches),
        "num_slides": len(asked),
        "num_patches": (int(patches.min()), int(patches.max())),
    }
    unset = Calibration(**values, enough=0.0)
    told = [unset.sufficiency(one, n) for one, n, has in zip(known, patches.tolist(), shows, strict=True) if has]
    return unset.changed(enough=float(np.quantile(told, 1 - SHOWS_ENOUGH)))


def usual_scores(
    training: Sequence[SampledSlide], summaries: Sequence[ScoreSummary], patches: NDArray[np.int64]
) -> list[UsualScores]:
    """What is usual, for each group of validation slides of about one length.

    Args:
        summaries, patches: of the validation slides.
    """
    groups = max(1, min(MAX_GROUPS, len(patches) // GROUP_SLIDES))
    ends = sorted({int(one) for one in np.quantile(patches, np.arange(1, groups + 1) / groups, method="higher")})
    found, begin = [], 0
    for end in ends:
        of_length = [one.scores for one in training if begin < one.num_patches <= end]
        scores = np.concatenate(of_length or [one.scores for one in training]).astype(np.float64)
        usual = np.quantile(scores, TRAINING_LEVELS).round(DIGITS).tolist()
        inside = [one for one, n in zip(summaries, patches, strict=True) if begin < n <= end]
        away = [distances(one.quantiles.numpy(), usual) for one in inside]
        body, tail = (_spread(values) for values in zip(*away, strict=True))
        found.append(UsualScores(max_patches=end, training_scores=usual, body_distances=body, tail_distances=tail))
        begin = end
    return found


def temperature_fit(logprobs: Sequence[NDArray], right: Sequence[int]) -> float:
    """The T for which softmax(logprobs / T) gives the right options the highest likelihood (Guo et al., On Calibration
    of Modern Neural Networks, 2017), with one further question whose answer is wrong: n right answers of n are no proof
    of certainty. Within [1 / 20, 20].
    """
    with needs_extra("eval"):
        from scipy.optimize import minimize_scalar

    wrong = 1 / (len(right) + 2)

    def loss(log_temperature: float) -> float:
        total = 0.0
        for one, place in zip(logprobs, right, strict=True):
            logs = one * math.exp(-log_temperature)
            logs = logs - np.logaddexp.reduce(logs)
            others = (logs.sum() - logs[place]) / max(1, len(logs) - 1)
            total -= (1 - wrong) * logs[place] + wrong * others
        return float(total)

    bounds = (-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def logistic_fit(features: NDArray, shows: NDArray) -> tuple[float, float, float]:
    """(weight of the best scores, weight of ln N, bias).

    By Platt's smoothed targets, so that data that a threshold parts give a finite slope. Higher scores never tell of
    less: the first weight is at least 0.

    Args:
        features: [n, 2], mean of the best scores and ln N.
        shows: bool [n].
    """
    with needs_extra("eval"):
        from scipy.optimize import minimize

    mean, spread = features.mean(axis=0), features.std(axis=0)
    scale = np.where(spread > 1e-6, spread, np.inf)  # what is alike everywhere gets no weight
    x = np.c_[(features - mean) / scale, np.ones(len(features))]
    positive = shows.sum()
    targets = np.where(shows, (positive + 1) / (positive + 2), 1 / (len(shows) - positive + 2))

    def loss(weights: NDArray) -> tuple[float, NDArray]:
        logits = x @ weights
        value = (np.logaddexp(0, logits) - targets * logits).sum() + RIDGE * (weights[:2] ** 2).sum()
        slope = x.T @ (1 / (1 + np.exp(-logits)) - targets)
        return value, slope + 2 * RIDGE * np.r_[weights[:2], 0]

    best = minimize(loss, np.zeros(3), jac=True, method="L-BFGS-B", bounds=[(0, None), (None, None), (None, None)]).x
    weights = best[:2] / scale
    return float(weights[0]), float(weights[1]), float(best[2] - weights @ mean)


def _spread(values: Sequence[float]) -> list[float]:
    """Ascending; of many the `KEPT_DISTANCES` that stand for all."""
    ordered = np.sort(values)
    if len(ordered) > KEPT_DISTANCES:
        ordered = np.quantile(ordered, (np.arange(KEPT_DISTANCES) + 0.5) / KEPT_DISTANCES)
    return ordered.round(DIGITS).tolist()
