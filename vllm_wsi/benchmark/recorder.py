"""Records the rows of one pass over the questions, and shows its progress."""

from __future__ import annotations

from collections.abc import Sequence

from .results import ResultsFile, Row
from .tasks import Question


class Recorder:
    """The open results file of one arm, with a progress bar that shows the accuracy so far. Use it in a `with`.

    Args:
        results: open; closed at the end of the `with`.
        questions: of the arm; those that have their answer already count as done.
        title: of the bar.
    """

    def __init__(self, results: ResultsFile, questions: Sequence[Question], title: str) -> None:
        from tqdm import tqdm

        self._results = results
        self.todo = [one for one in questions if not results.done(one.key)]
        """The questions that have no answer yet, in their order."""
        done = [results.rows[one.key] for one in questions if results.done(one.key)]
        self._num_asked, self._num_correct = len(done), sum(row.correct for row in done)
        self._bar = tqdm(total=len(questions), initial=len(done), desc=title, unit="q", disable=None)

    def record(self, row: Row) -> None:
        """Appends a row; it is on disk when this returns."""
        self._results.append(row)
        self._num_asked += row.status != "missing"
        self._num_correct += row.correct
        self._bar.set_postfix_str(f"accuracy {self._num_correct / max(1, self._num_asked):.3f}", refresh=False)
        self._bar.update()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._results.close()
