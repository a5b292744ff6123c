"""Many slides: which there are, what is done already, several workers, and what became of each."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from .encode import EncodeResult, EncodeSettings, encode_slide
from .encoders import PatchEncoder, load_encoder
from .features import SlideError, write_atomically
from .formats import IMAGE_SUFFIXES, open_features

SUMMARY = "encode_summary.csv"


@dataclass(frozen=True)
class Job:
    """One slide and the feature file that becomes of it."""

    slide: Path
    out: Path


@dataclass(frozen=True)
class Outcome:
    """What became of one slide; a row of the summary."""

    slide: str
    status: Literal["done", "skipped", "failed"]
    patches: int = 0
    seconds: float = 0.0
    reason: str = ""


def find_jobs(paths: Sequence[Path], out: Path) -> list[Job]:
    """Slides named singly or found below folders, each with its own place below `out`.

    Raises:
        SlideError: a path does not exist, a folder holds no slide, or two slides would share one feature file.
    """
    jobs: list[Job] = []
    for path in paths:
        if not path.is_dir():
            jobs.append(Job(path, out / f"{path.stem}.safetensors"))
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not found:
            raise SlideError(f"{path}: found no slide images, wanted {', '.join(sorted(IMAGE_SUFFIXES))}")
        jobs += [Job(p, (out / p.relative_to(path)).with_suffix(".safetensors")) for p in found]
    by_out: dict[Path, Path] = {}
    for job in jobs:
        other = by_out.setdefault(job.out, job.slide)
        if other.resolve() != job.slide.resolve():
            raise SlideError(f"{job.out}: found two slides for it, {other} and {job.slide}, wanted one; rename one")
    return [Job(slide, place) for place, slide in by_out.items()]


def is_finished(job: Job, encoder_id: str, settings: EncodeSettings) -> bool:
    """Whether the feature file is there already, made the same way.

    Raises:
        SlideError: something else is there.
    """
    if not job.out.exists():
        return False
    with open_features(job.out) as found:
        wanted = settings.record() | {"encoder": encoder_id, "slide_file": job.slide.name}
        for key, value in wanted.items():
            if (there := found.metadata.get(key)) != value:
                raise SlideError(f"{job.out}: {key}: found {there!r}, wanted {value!r}; choose another --out")
        if found.dtype != settings.dtype:
            raise SlideError(f"{job.out}: dtype: found {found.dtype}, wanted {settings.dtype}; choose another --out")
    return True


def encode_many(
    jobs: Sequence[Job],
    encoder_name: str,
    settings: EncodeSettings,
    device: str = "auto",
    workers: int | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Outcome]:
    """Encodes slides; one that fails, or that takes its process down, stops no other.

    Args:
        workers: processes; None: one for each core for the built-in encoder, one for others, which use all cores.
        on_outcome: called as each slide ends.
        on_progress: called with patches done and in all, where one worker does one slide after the other.

    Returns:
        In the order of the jobs.
    """
    encoder = load_encoder(encoder_name, device)  # whatever is wrong with it is wrong once, here
    if workers is None:
        workers = 1 if encoder.on_gpu or encoder.input_px is not None else os.cpu_count() or 1
    outcomes: dict[Job, Outcome] = {}
    waiting: list[Job] = []
    for job in jobs:
        try:
            if not is_finished(job, encoder.id, settings):
                waiting.append(job)
                continue
            outcome = Outcome(str(job.slide), "skipped")
        except SlideError as error:
            outcome = Outcome(str(job.slide), "failed", reason=str(error))
        outcomes[job] = outcome
        on_outcome(outcome)
    workers = min(workers, len(waiting))
    if workers > 1:
        ended = _in_processes(waiting, (encoder_name, device), settings, workers)
    else:
        ended = ((job, _encode(job, encoder, settings, on_progress)) for job in waiting)
    for job, outcome in ended:
        outcomes[job] = outcome
        on_outcome(outcome)
    return [outcomes[job] for job in jobs]


def _encode(
    job: Job,
    encoder: PatchEncoder,
    settings: EncodeSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    began = time.perf_counter()
    try:
        result: EncodeResult = encode_slide(job.slide, job.out, encoder, settings, on_progress)
    except (SlideError, OSError, MemoryError) as error:
        return Outcome(str(job.slide), "failed", reason=str(error) or type(error).__name__)
    except Exception as error:  # of a library, on a file that nobody foresaw: the other slides go on
        reason = f"{job.slide}: found a file that its reader trips over ({type(error).__name__}: {error})"
        return Outcome(str(job.slide), "failed", reason=reason)
    return Outcome(str(job.slide), "done", result.num_patches, round(time.perf_counter() - began, 2))


_worker_encoder: PatchEncoder | None = None


def _start_worker(name: str, device: str) -> None:
    global _worker_encoder
    import torch

    torch.set_num_threads(1)
    _worker_encoder = load_encoder(name, device)


def _encode_in_worker(job: Job, settings: EncodeSettings) -> Outcome:
    assert _worker_encoder is not None
    return _encode(job, _worker_encoder, settings)


def _in_processes(
    jobs: Sequence[Job], encoder: tuple[str, str], settings: EncodeSettings, workers: int
) -> Iterator[tuple[Job, Outcome]]:
    """A damaged slide can take a native reader's whole process down, and with it the pool: what the pool had not
    finished is then tried again, each slide in a process of its own."""
    left = list(jobs)
    for job, outcome in _pool(jobs, encoder, settings, workers):
        if outcome is not None:
            left.remove(job)
            yield job, outcome
    for job in left:
        for _, outcome in _pool([job], encoder, settings, 1):
            crashed = Outcome(str(job.slide), "failed", reason=f"{job.slide}: found a slide that ends its reader")
            yield job, outcome or crashed


def _pool(
    jobs: Iterable[Job], encoder: tuple[str, str], settings: EncodeSettings, workers: int
) -> Iterator[tuple[Job, Outcome | None]]:
    """(job, None) where the process ended before the slide did."""
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    with ProcessPoolExecutor(workers, context, _start_worker, encoder) as pool:
        futures = {}
        for job in jobs:
            try:
                futures[pool.submit(_encode_in_worker, job, settings)] = job
            except BrokenProcessPool:
                yield job, None
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], None


def write_summary(out: Path, outcomes: Sequence[Outcome]) -> Path:
    """One CSV row for each slide."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow([column.name for column in fields(Outcome)])
    table.writerows(astuple(outcome) for outcome in outcomes)
    path = out / SUMMARY
    write_atomically(path, text.getvalue().encode())
    return path


def count_by_status(outcomes: Iterable[Outcome]) -> Counter[str]:
    return Counter(outcome.status for outcome in outcomes)
