"""An evaluation: its settings, the questions that each arm asks, and the slides and results files of those."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import Field, field_validator

from vllm_wsi import __version__
from vllm_wsi.errors import SettingsError, SetupError, SlideError
from vllm_wsi.settings import Settings

from .chat_request import Mode
from .prepared import PreparedQuestion, missing_row
from .recorder import Recorder
from .results import ResultsFile, Row
from .slide_files import POLICIES, SlideFile, SlideFiles
from .tasks import Question, read_task, to_messages

MAIN = "slide"
"""The arm that asks about the whole slide; the others are its baselines."""

ASKED_BASELINES = ("blind", *POLICIES)
BASELINES = ("blind", "constant", *POLICIES)
"""All baselines; `constant` needs no asking."""


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
    """One pass over the questions: in one mode, about the whole slide or as a baseline."""

    mode: Mode
    arm: str  # `MAIN`, or one of `ASKED_BASELINES`

    @property
    def file_name(self) -> str:
        """Of its results file."""
        return f"{self.mode}.{self.arm}.jsonl"


class Evaluation:
    """The questions of a run and its files.

    Raises:
        QuestionError: the question file is bad.
        SettingsError: a slide that is to be skipped is in no question, or no question is left.
        SlideError: there is no directory of features.
    """

    def __init__(self, settings: EvalSettings) -> None:
        self.settings = settings
        all_questions = read_task(settings.task, settings.data, settings.columns)
        prompts = json.dumps([(one.key, to_messages(one, "slide")) for one in all_questions], sort_keys=True)
        self._prompt_sha256 = hashlib.sha256(prompts.encode()).hexdigest()
        if unknown := settings.skip_slides - {one.slide for one in all_questions}:
            raise SettingsError(
                f"{settings.data}: found no slide {sorted(unknown)[0]!r}, wanted it, as it is to be skipped"
            )
        kept = [one for one in all_questions if one.slide not in settings.skip_slides]
        if not kept:
            raise SettingsError(f"{settings.data}: found no question about other slides than the skipped, wanted one")
        self.num_skipped = len(all_questions) - len(kept)
        self.questions = kept[: settings.limit]
        self.files = SlideFiles(settings.features, settings.features_url, settings.work, settings.seed)

    @property
    def arms(self) -> list[Arm]:
        """For each mode the main arm and then the baselines that are asked."""
        names = (MAIN, *(name for name in ASKED_BASELINES if name in self.settings.baselines))
        return [Arm(mode, name) for mode in self.settings.modes for name in names]

    def questions_in(self, mode: Mode) -> list[Question]:
        """The questions that a mode asks: "choice" leaves open questions out.

        They are sorted by slide, so that the server finds a slide's tokens in its prefix cache.
        """
        chosen = [one for one in self.questions if one.options or mode == "generate"]
        return sorted(chosen, key=lambda one: one.slide)

    def recorder(self, arm: Arm, model: str, endpoint: str, versions: Mapping[str, str | None]) -> Recorder:
        """Opens the results file of an arm, new or to be continued.

        Args:
            model: that answers.
            endpoint: where it answers, as the file records it.
            versions: of what answers, beside those that are recorded anyway.

        Raises:
            SettingsError: the file belongs to other settings, or answers in it are about other features than there are
                now, or another process writes it.
        """
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
        results = ResultsFile(settings.out / arm.file_name, run)
        questions = self.questions_in(arm.mode)
        try:
            for question in questions:
                if results.done(question.key):
                    self._compare_slide(results, results.rows[question.key])
        except BaseException:
            results.close()
            raise
        return Recorder(results, questions, f"{arm.mode} {arm.arm}")

    def _compare_slide(self, results: ResultsFile, row: Row) -> None:
        """Refuses to go on where an answered question's slide has other features by now.

        Raises:
            SettingsError: names the slide, what was asked about, and what there is.
        """
        advice = "take another --out, or delete the file"
        try:
            slide = self.files.find(row.slide)
        except (SlideError, OSError) as error:
            raise SettingsError(
                f"{results.path}: slide {row.slide!r}: found an answer about its {row.num_patches} patches, "
                f"wanted none, as there are no usable features now ({error}); {advice}"
            ) from None
        for name, before, now in (
            ("encoder", row.encoder, slide.encoder),
            ("num_patches", row.num_patches, slide.num_patches),
            ("slide_digest", row.slide_digest, slide.digest),
        ):
            if before != now:
                raise SettingsError(
                    f"{results.path}: slide {row.slide!r}: {name}: found an answer about {before!r}, "
                    f"wanted {now!r} of {slide.path}; {advice}"
                )

    def prepare(self, question: Question, arm: Arm, is_to_be_asked: bool = True) -> PreparedQuestion | Row:
        """Finds the slide of a question, and writes the 32 patches of a baseline where the arm is one.

        May be called from several threads.

        Args:
            is_to_be_asked: False where the answer is there already: nothing is written, and the URL is None.

        Returns:
            The question with its slide; where the slide has no usable features, the row that says so.

        Raises:
            SetupError: the 32 patches of a baseline cannot be written, which is no fault of the slide.
        """
        try:
            slide = self.files.find(question.slide)
            url = self._url(slide, arm) if is_to_be_asked else None
        except (SlideError, OSError) as error:
            return missing_row(question, str(error))
        return PreparedQuestion(question, arm.mode, slide, url, is_selected=arm.arm == MAIN)

    def _url(self, slide: SlideFile, arm: Arm) -> str | None:
        if arm.arm == "blind":
            return None
        if arm.arm == MAIN:
            return self.files.url(slide)
        try:
            return self.files.url(slide, policy=arm.arm)
        except OSError as error:
            raise SetupError(
                f"{error}: found no way to write the patches of {arm.arm}, wanted a --work for them"
            ) from None
