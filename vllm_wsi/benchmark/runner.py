"""`vllm-wsi eval`: asks a server, or vLLM in this process, every question of a benchmark, beside its baselines."""

from __future__ import annotations

import asyncio
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import openai
from pydantic import Field, field_validator

from vllm_wsi import __version__
from vllm_wsi.errors import SettingsError, SetupError, SlideError
from vllm_wsi.settings import Settings

from .ask_endpoint import FATAL, Answer, Endpoint, Mode
from .results import ResultsFile, Row
from .slide_files import RULES, SlideFile, SlideFiles
from .tasks import Question, read_task, to_messages

MAIN = "slide"
ASKED_BASELINES = ("blind", *RULES)
BASELINES = ("blind", "constant", *RULES)
UNREACHABLE = 3
"""Rounds of all workers without a single answer, after which a run ends instead of asking the rest in vain."""


class EvalSettings(Settings, frozen=True):
    """What is asked and how. See `vllm-wsi eval --help`."""

    task: str
    data: Path
    features: Path
    out: Path
    modes: tuple[Mode, ...] = ("generate",)
    baselines: tuple[str, ...] = BASELINES
    columns: Mapping[str, str] = Field(default_factory=dict)
    skip_slides: frozenset[str] = frozenset()
    limit: int | None = Field(None, ge=1)
    features_url: str | None = None
    work: Path | None = None
    max_tokens: int = Field(500, ge=1)  # as SlideChat
    seed: int = 0
    concurrency: int = Field(8, ge=1)

    @field_validator("baselines")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(names) - set(BASELINES):
            raise ValueError(f"found {', '.join(sorted(unknown))}, wanted some of {', '.join(BASELINES)}")
        return names


@dataclass(frozen=True)
class Arm:
    """One pass over the questions."""

    mode: Mode
    arm: str  # "slide", or a baseline that is asked

    @property
    def file_name(self) -> str:
        return f"{self.mode}.{self.arm}.jsonl"


class Evaluation:
    """The questions of a run and its files.

    Raises:
        QuestionError: the question file is bad, or nothing is left of it.
        SettingsError: a slide to be skipped is not there, or no other is left.
        SlideError: there is no directory of features.
    """

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings
        everything = read_task(settings.task, settings.data, settings.columns)
        prompts = json.dumps([(one.key, to_messages(one, "slide")) for one in everything], sort_keys=True)
        self._prompt_sha256 = hashlib.sha256(prompts.encode()).hexdigest()
        kept = [one for one in everything if one.slide not in settings.skip_slides]
        if unknown := settings.skip_slides - {one.slide for one in everything}:
            raise SettingsError(
                f"{settings.data}: found no slide {sorted(unknown)[0]!r}, wanted it, as it is to be skipped"
            )
        if not kept:
            raise SettingsError(f"{settings.data}: found no question about other slides than the skipped, wanted one")
        self.num_skipped = len(everything) - len(kept)
        self.questions = kept[: settings.limit]
        self.files = SlideFiles(settings.features, settings.features_url, settings.work, settings.seed)

    @property
    def arms(self) -> list[Arm]:
        names = (MAIN, *(name for name in ASKED_BASELINES if name in self.settings.baselines))
        return [Arm(mode, name) for mode in self.settings.modes for name in names]

    def asked(self, mode: Mode) -> list[Question]:
        """By slide, so that its tokens are found in the server's prefix cache; `choice` has no open questions."""
        chosen = [one for one in self.questions if one.options or mode == "generate"]
        return sorted(chosen, key=lambda one: one.slide)

    def open(self, arm: Arm, model: str, endpoint: str, versions: Mapping[str, str | None]) -> ResultsFile:
        """The results file of an arm, new or to be continued."""
        settings = self.settings
        run = {
            "task": settings.task,
            "data": settings.data.name,
            "data_sha256": hashlib.sha256(settings.data.read_bytes()).hexdigest(),
            "mode": arm.mode,
            "arm": arm.arm,
            "model": model,
            "prompt_sha256": self._prompt_sha256,
            "max_tokens": settings.max_tokens if arm.mode == "generate" else 1,
            "temperature": 0.0,
            "seed": settings.seed,
            "endpoint": endpoint,
            "versions": {"vllm-wsi": __version__, "openai": version("openai"), "python": platform.python_version()}
            | dict(versions),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return ResultsFile(settings.out / arm.file_name, run)

    def prepare(self, question: Question, arm: Arm) -> tuple[SlideFile, str | None]:
        """(the slide's file, the URL to ask about).

        Raises:
            SlideError, OSError: there is no usable file.
            SetupError: the 32 patches of a baseline cannot be written, which is no fault of the slide.
        """
        slide = self.files.find(question.slide)
        if arm.arm == "blind":
            return slide, None
        if arm.arm == MAIN:
            return slide, self.files.url(slide)
        try:
            return slide, self.files.url(slide, arm.arm)
        except OSError as error:
            raise SetupError(
                f"{error}: found no way to write the patches of {arm.arm}, wanted a --work for them"
            ) from None


def missing_row(question: Question, reason: str) -> Row:
    """A question whose slide has no usable features."""
    return Row(question.key, question.slide, "missing", question.gold, categories=dict(question.categories),
               options=len(question.options), error=reason)  # fmt: skip


def answer_row(question: Question, slide: SlideFile, answer: Answer, seconds: float | None) -> Row:
    score = answer.score
    return Row(
        question.key,
        question.slide,
        "answered",
        question.gold,
        score.label,
        score.rule,
        score.correct,
        dict(score.other),
        answer.output,
        None if answer.logprobs is None else dict(answer.logprobs),
        dict(question.categories),
        len(question.options),
        slide.num_patches,
        slide.encoder,
        answer.finish_reason,
        None,
        seconds,
    )


def error_row(question: Question, slide: SlideFile, reason: str, seconds: float | None) -> Row:
    """A question that the server gave no answer to."""
    return Row(question.key, question.slide, "error", question.gold, categories=dict(question.categories),
               options=len(question.options), num_patches=slide.num_patches, encoder=slide.encoder,
               error=reason, seconds=seconds)  # fmt: skip


async def ask_endpoint(evaluation: Evaluation, endpoint: Endpoint) -> None:
    """Asks every arm's open questions, a bounded number at once; results are on disk as they come.

    Raises:
        SetupError: the server is not there, refuses the key or the model, or has stopped answering.
    """
    model, found = await endpoint.model(), await endpoint.version()
    for arm in evaluation.arms:
        questions = evaluation.asked(arm.mode)
        with (
            evaluation.open(arm, model, endpoint.url, {"server": found}) as results,
            Progress(arm, questions, results) as record,
        ):
            await _ask_arm(evaluation, endpoint, arm, questions, results, record)


async def _ask_arm(
    evaluation: Evaluation,
    endpoint: Endpoint,
    arm: Arm,
    questions: Sequence[Question],
    results: ResultsFile,
    record: Callable[[Row], None],
) -> None:
    todo = iter([one for one in questions if not results.done(one.key)])
    failures = 0

    async def work() -> None:
        nonlocal failures
        for question in todo:  # shared by all workers
            began = time.monotonic()
            try:
                slide, url = await asyncio.to_thread(evaluation.prepare, question, arm)
            except (SlideError, OSError) as error:
                record(missing_row(question, str(error)))
                continue
            try:
                answer = await endpoint.ask(question, url, arm.mode, evaluation.settings.max_tokens)
            except FATAL as error:
                raise SetupError(f"{endpoint.url}: {error}") from None
            except (openai.OpenAIError, ValueError, KeyError, TypeError, IndexError) as error:
                failures += isinstance(error, openai.APIConnectionError)
                record(error_row(question, slide, f"{type(error).__name__}: {error}", time.monotonic() - began))
                if failures >= UNREACHABLE * evaluation.settings.concurrency:
                    raise SetupError(
                        f"{endpoint.url}: found no connection for {failures} questions on end, wanted answers; "
                        "what was answered is kept, the same command goes on"
                    ) from None
            else:
                failures = 0
                record(answer_row(question, slide, answer, round(time.monotonic() - began, 3)))

    workers = [asyncio.create_task(work()) for _ in range(evaluation.settings.concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


class Progress:
    """A bar with the accuracy so far; calling it records a row."""

    def __init__(self, arm: Arm, questions: Sequence[Question], results: ResultsFile) -> None:
        from tqdm import tqdm

        self._results = results
        old = [results.rows[one.key] for one in questions if results.done(one.key)]
        self._asked, self._right = len(old), sum(row.correct for row in old)
        self._bar = tqdm(total=len(questions), initial=len(old), desc=f"{arm.mode} {arm.arm}", unit="q", disable=None)

    def __call__(self, row: Row) -> None:
        self._results.append(row)
        self._asked += row.status != "missing"
        self._right += row.correct
        self._bar.set_postfix_str(f"accuracy {self._right / max(1, self._asked):.3f}", refresh=False)
        self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
