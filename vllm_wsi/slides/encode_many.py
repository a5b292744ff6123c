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

from .encode import EncodeResult, EncodeSettings, encode_slide, hash_slide
from .encoders import PatchEncoder, load_encoder
from .features import SlideError, write_atomically
from .formats import IMAGE_SUFFIXES, QC_SUFFIX, open_features

SUMMARY = "encode_summary.csv"


@dataclass(frozen=True)
class Job:
    """One slide and the feature file that becomes of it."""

    slide: Path
    out: Path
    qc: Path | None = None  # of its picture of tissue and patches


@dataclass(frozen=True)
class Outcome:
    """What became of one slide; a row of the summary."""

    slide: str
    status: Literal["done", "skipped", "failed"]
    patches: int = 0
    tissue_share: float | None = None  # of the slide
    seconds: float = 0.0
    reason: str = ""  # why it failed or was skipped; of a slide that is done, what looks wrong


def find_jobs(paths: Sequence[Path], out: Path, qc: Path | None = None) -> list[Job]:
    """Slides named singly or found below folders, each with its own place below `out`, and below `qc`.

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
    return [
        Job(slide, place, None if qc is None else qc / place.relative_to(out).with_suffix(QC_SUFFIX))
        for place, slide in by_out.items()
    ]


def finished_hash(job: Job, encoder_id: str, settings: EncodeSettings) -> str | None:
    """The slide's hash, by its feature file that is there already, made the same way; None: there is none.

    Raises:
        SlideError: something else is there.
    """
    if not job.out.exists():
        return None
    with open_features(job.out) as found:
        wanted = settings.record() | {"encoder": encoder_id, "slide_file": job.slide.name}
        for key, value in wanted.items():
            if (there := found.metadata.get(key)) != value:
                raise SlideError(f"{job.out}: {key}: found {there!r}, wanted {value!r}; choose another --out")
        if found.dtype != settings.dtype:
            raise SlideError(f"{job.out}: dtype: found {found.dtype}, wanted {settings.dtype}; choose another --out")
        return found.metadata.get("slide_hash", "")


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
    known: dict[str, Path] = {}  # slide's hash -> the first file of that slide
    waiting = _not_finished(jobs, encoder.id, settings, outcomes, known)
    for job in jobs:
        if job in outcomes:
            on_outcome(outcomes[job])
    workers = min(workers, len(waiting))
    if workers > 1:
        ended = _in_processes(waiting, (encoder_name, device), settings, workers, known)
    else:
        ended = _in_turn(waiting, encoder, settings, on_progress, known)
    for job, outcome in ended:
        outcomes[job] = outcome
        on_outcome(outcome)
    return [outcomes[job] for job in jobs]


def _not_finished(
    jobs: Sequence[Job],
    encoder_id: str,
    settings: EncodeSettings,
    outcomes: dict[Job, Outcome],
    known: dict[str, Path],
) -> list[Job]:
    """The jobs whose feature files are not there; what became of the others goes to `outcomes`."""
    waiting: list[Job] = []
    for job in jobs:
        try:
            hashed = finished_hash(job, encoder_id, settings)
            if hashed is None:
                waiting.append(job)
                continue
            known.setdefault(hashed, job.slide)
            outcomes[job] = Outcome(str(job.slide), "skipped", reason="its feature file is there")
        except SlideError as error:
            outcomes[job] = Outcome(str(job.slide), "failed", reason=str(error))
    return waiting


def _same(job: Job, hashed: str | None, known: dict[str, Path]) -> Outcome | None:
    """An outcome where this slide is another's: one slide may have two names, and a series several files."""
    if hashed is None or (first := known.setdefault(hashed, job.slide)) == job.slide:
        return None
    return Outcome(str(job.slide), "skipped", reason=f"the same slide as {first}")


def _hash(job: Job, settings: EncodeSettings) -> str | None:
    """None: it cannot be opened, which its encoding will say."""
    try:
        return hash_slide(job.slide, settings.channels)
    except (SlideError, OSError):
        return None


def _in_turn(
    jobs: Sequence[Job],
    encoder: PatchEncoder,
    settings: EncodeSettings,
    on_progress: Callable[[int, int], None],
    known: dict[str, Path],
) -> Iterator[tuple[Job, Outcome]]:
    for job in jobs:
        same = _same(job, _hash(job, settings), known) if len(jobs) + len(known) > 1 else None
        yield job, same or _encode(job, encoder, settings, on_progress)


def _encode(
    job: Job,
    encoder: PatchEncoder,
    settings: EncodeSettings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    began = time.perf_counter()
    try:
        result: EncodeResult = encode_slide(job.slide, job.out, encoder, settings, on_progress, job.qc)
    except (SlideError, OSError, MemoryError) as error:
        return Outcome(str(job.slide), "failed", reason=str(error) or type(error).__name__)
    except Exception as error:  # of a library, on a file that nobody foresaw: the other slides go on
        reason = f"{job.slide}: found a file that its reader trips over ({type(error).__name__}: {error})"
        return Outcome(str(job.slide), "failed", reason=reason)
    seconds, share = round(time.perf_counter() - began, 2), round(result.tissue_share, 4)
    return Outcome(str(job.slide), "done", result.num_patches, share, seconds, result.warning)


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
    jobs: Sequence[Job], encoder: tuple[str, str], settings: EncodeSettings, workers: int, known: dict[str, Path]
) -> Iterator[tuple[Job, Outcome]]:
    """A damaged slide can take a native reader's whole process down, and with it the pool: what the pool had not
    finished is then tried again, each slide in a process of its own."""
    left = list(jobs)
    for job, outcome in _pool(jobs, encoder, settings, workers, known):
        if outcome is not None:
            left.remove(job)
            yield job, outcome
    for job in left:
        for _, outcome in _pool([job], encoder, settings, 1, known):
            crashed = Outcome(str(job.slide), "failed", reason=f"{job.slide}: found a slide that ends its reader")
            yield job, outcome or crashed


def _pool(
    jobs: Sequence[Job], encoder: tuple[str, str], settings: EncodeSettings, workers: int, known: dict[str, Path]
) -> Iterator[tuple[Job, Outcome | None]]:
    """(job, None) where the process ended before the slide did."""
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    with ProcessPoolExecutor(workers, context, _start_worker, encoder) as pool:
        try:
            hashes = list(pool.map(_hash, jobs, [settings] * len(jobs)))
        except BrokenProcessPool:
            yield from ((job, None) for job in jobs)
            return
        futures = {}
        for job, hashed in zip(jobs, hashes, strict=True):
            try:
                if (same := _same(job, hashed, known)) is not None:
                    yield job, same
                else:
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
