"""One JSONL file for each run: what was asked and how, then a line for each question, appended as it is answered."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from vllm_wsi.errors import SettingsError

Status = Literal["answered", "missing", "error"]
NOT_IDENTITY = ("endpoint", "versions", "encoders", "started")
"""Settings that may change between a run and its continuation."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question of one run; a line of its results file."""

    key: str
    slide: str
    status: Status  # missing: the slide has no usable features, so it was not asked; error: there was no answer
    gold: str
    label: str | None = None  # that the answer names
    rule: str = ""  # by which the label was found, as in `tasks.Score`
    correct: bool = False
    other: Mapping[str, float] = field(default_factory=dict)  # further measures, in [0, 1]
    output: str = ""
    logprobs: Mapping[str, float] | None = None  # label -> log-probability at the first token of the answer
    confidence: float | None = None  # probability of the label among the options; None where it is not known
    # What the checkpoint's calibration says of the slide; None where it has none, or was not asked.
    sufficiency: float | None = None
    in_distribution: float | None = None
    categories: Mapping[str, str] = field(default_factory=dict)
    options: int = 0  # their number; 0: an open question
    num_patches: int | None = None
    encoder: str | None = None
    slide_digest: str | None = None  # of the features that it was asked about, as in `slide_files.SlideFile`
    finish_reason: str | None = None
    error: str | None = None  # why it is missing or has no answer
    seconds: float | None = None  # with retries


class ResultsFile:
    """An append-only results file, locked against other processes. Use it in a `with`, or close it.

    Of several lines with one key the last one counts. An incomplete last line, as a killed run leaves it, is cut off.

    Args:
        path: made, with its folder, where it does not exist.
        run: settings, as JSON; a file of other settings is refused, except for `NOT_IDENTITY`.

    Raises:
        SettingsError: the file belongs to other settings, or is no results file, or another process writes it.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SettingsError(f"{self.path}: found another process writing it, wanted it alone") from None
            self._file.seek(0)
            whole = self._file.read()
            kept = whole.rfind(b"\n") + 1
            if kept < len(whole):
                self._file.truncate(kept)
            if kept:
                self.run, rows = _parse(self.path, whole[:kept])
                _compare(self.path, self.run, run)
            else:
                self.run, rows = dict(run), []
                self._write({"run": self.run})
        except BaseException:
            self._file.close()
            raise
        self.rows = {row.key: row for row in rows}

    def done(self, key: str) -> bool:
        """Whether a question has its answer; missing slides and errors are tried again."""
        return key in self.rows and self.rows[key].status == "answered"

    def append(self, row: Row) -> None:
        """Writes the row at once, unbuffered, so that it is kept when the process is killed."""
        before = self.rows.get(row.key)
        self.rows[row.key] = row
        if before != row:
            self._write(asdict(row))

    def _write(self, value: Mapping[str, Any]) -> None:
        line = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        while line:
            line = line[os.write(self._file.fileno(), line) :]

    def close(self) -> None:
        """Closes the file and gives its lock back."""
        self._file.close()

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


def read_results(path: str | Path) -> tuple[dict[str, Any], dict[str, Row]]:
    """(settings, last row of each key) of a results file.

    Raises:
        SettingsError: it is none.
    """
    path = Path(path)
    whole = path.read_bytes()
    run, rows = _parse(path, whole[: whole.rfind(b"\n") + 1])
    return run, {row.key: row for row in rows}


def _parse(path: Path, data: bytes) -> tuple[dict[str, Any], list[Row]]:
    lines = data.decode("utf-8", "replace").split("\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if number == 1:
                run = dict(value["run"])
                rows = []
            else:
                rows.append(Row(**value))
        except (ValueError, KeyError, TypeError) as error:
            wanted = "a row of results" if number > 1 else "the run's settings"
            raise SettingsError(f"{path}, line {number}: found no {wanted} ({error}), wanted one") from None
    if not lines:
        raise SettingsError(f"{path}: found nothing, wanted results")
    return run, rows


def _compare(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in {*before, *now} - {*NOT_IDENTITY}:
        if before.get(name) != now.get(name):
            raise SettingsError(
                f"{path}: {name}: found results of {before.get(name)!r}, wanted {now.get(name)!r}; "
                "take another --out, or delete the file"
            )
