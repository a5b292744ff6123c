"""A command over many slides: where the result of each goes, and what became of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from vllm_wsi.errors import SlideError
from vllm_wsi.files import write_csv


@dataclass(frozen=True)
class Outcome:
    """What became of one slide; a row of the summary."""

    slide: str
    status: Literal["done", "skipped", "failed"]
    patches: int = 0
    seconds: float = 0.0
    reason: str = ""
    warning: str = ""  # what may be wrong with the result


def place_slides(
    paths: Sequence[Path], out: Path, find: Callable[[Path], Sequence[Path] | None], suffix: str = ".safetensors"
) -> dict[Path, Path]:
    """Slides named singly or found below folders, each with its own place below `out`.

    Args:
        find: the slides below a path; None where the path itself is one.

    Returns:
        place -> slide; a folder's slides lie below `out` as they lie in the folder.

    Raises:
        SlideError: two slides would share one place.
    """
    pairs: list[tuple[Path, Path]] = []
    for path in paths:
        found = find(path)
        if found is None:
            pairs.append((out / f"{path.stem}{suffix}", path))
        else:
            pairs += [((out / one.relative_to(path)).with_suffix(suffix), one) for one in found]
    by_place: dict[Path, Path] = {}
    for place, slide in pairs:
        other = by_place.setdefault(place, slide)
        if other.resolve() != slide.resolve():
            raise SlideError(f"{place}: found two slides for it, {other} and {slide}, wanted one; rename one")
    return by_place


def why_failed(slide: Path, error: Exception) -> str:
    """One sentence for the summary; also of an error of a library, on a file that nobody foresaw."""
    if isinstance(error, (SlideError, OSError, MemoryError)):
        return str(error) or type(error).__name__
    return f"{slide}: found a file that its reader trips over ({type(error).__name__}: {error})"


def crashed(slide: Path) -> str:
    """Why a slide failed that took its process down."""
    return f"{slide}: found a slide that ends its reader"


def write_summary(path: Path, outcomes: Sequence[Outcome], kind: type[Outcome] = Outcome) -> None:
    """One CSV row for each slide."""
    write_csv(path, map(asdict, outcomes), [column.name for column in fields(kind)])


def count_by_status(outcomes: Iterable[Outcome]) -> Mapping[str, int]:
    """Slides done, skipped and failed."""
    return Counter(outcome.status for outcome in outcomes)
