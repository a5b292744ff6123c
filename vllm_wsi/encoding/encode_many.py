"""Many slide images to feature files: which there are, what is done already, and each slide once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vllm_wsi.errors import SlideError
from vllm_wsi.executors import Executor, LocalExecutor, Work
from vllm_wsi.files import IMAGE_SUFFIXES, QC_SUFFIX
from vllm_wsi.slides.formats.dispatch import open_features
from vllm_wsi.slides.identity import SlideIdentity, read_record
from vllm_wsi.slides.many_slides import Outcome, crashed, place_slides, why_failed
from vllm_wsi.slides.units import positive_number

from .encode_slide import MPP_SOURCE, SOURCE, EncodeResult, EncodeSettings, encode_slide
from .encoders import BUILT_IN, PatchEncoder, load_encoder
from .same_slide import Sameness, find_same, slide_key

SLIDES_A_STARTER = 50  # of which one process tells the hashes before another is worth its start
SUMMARY = "encode_summary.csv"


@dataclass(frozen=True)
class Job:
    """One slide and the feature file that becomes of it."""

    slide: Path
    out: Path
    qc: Path | None = None  # picture of its tissue and patches


@dataclass(frozen=True)
class Encoded(Outcome):
    """What became of one slide image."""

    tissue_share: float | None = None  # of what was scanned


def find_jobs(paths: Sequence[Path], out: Path, qc: Path | None = None) -> list[Job]:
    """Slides named singly or found below folders, each with its own place below `out`, and below `qc`.

    Raises:
        SlideError: a path does not exist, a folder holds no slide, or two slides would share one feature file.
    """
    jobs = []
    for place, slide in place_slides(paths, out, _images_below).items():
        picture = None if qc is None else (qc / place.relative_to(out)).with_suffix(QC_SUFFIX)
        jobs.append(Job(slide, place, picture))
    return jobs


def _images_below(path: Path) -> list[Path] | None:
    if not path.is_dir():
        return None
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    inner = {p.with_suffix("") for p in found if p.suffix.lower() == ".mrxs"}  # the folder that holds its data
    found = [p for p in found if inner.isdisjoint(p.parents)]
    if not found:
        raise SlideError(f"{path}: found no slide images, wanted {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def nothing(path: Path) -> None:
    """What is done with a new feature file where nothing is asked for."""


def finished(job: Job, encoder_id: str, settings: EncodeSettings) -> Encoded | str:
    """What the feature file tells that is there already, made of the same slide in its present state, the same way.

    Args:
        settings: resolved for the encoder.

    Returns:
        A str: why the slide is encoded although a file is there; empty where none is.

    Raises:
        SlideError: something else is there, or the slide is not.
    """
    if not job.out.exists():
        return ""
    with open_features(job.out) as found:
        wanted = settings.record() | {"encoder": encoder_id, "slide_file": job.slide.name}
        if settings.mpp is not None:
            wanted["mpp"] = f"{settings.mpp:g}"
        for key, value in wanted.items():
            if (there := found.metadata.get(key)) != value:
                raise SlideError(f"{job.out}: {key}: found {there!r}, wanted {value!r}; choose another --out")
        if found.dtype != settings.dtype:
            raise SlideError(f"{job.out}: dtype: found {found.dtype}, wanted {settings.dtype}; choose another --out")
        if settings.mpp is None and found.metadata.get(MPP_SOURCE) == "given":
            there = f"found {found.metadata.get('mpp')!r}, given by --mpp, wanted the slide's own"
            raise SlideError(f"{job.out}: mpp: {there}; choose another --out")
        if not (source := read_record(found.metadata.get(SOURCE))):
            return "encoded anew: the file there did not say in which state its slide was"
        if source != SlideIdentity.of_file(job.slide).record():
            return "encoded anew: the slide has changed since"
        share = positive_number(found.metadata.get("tissue_share"))
        return Encoded(str(job.slide), "skipped", found.num_patches, reason="is there already", tissue_share=share)


# Many parameters: what is encoded, how, on what, and who is told.
def encode_many(
    jobs: Sequence[Job],
    encoder_name: str,
    settings: EncodeSettings,
    device: str = "auto",
    executor: Executor | None = None,
    on_outcome: Callable[[Encoded], None] = lambda outcome: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    afterwards: Callable[[Path], None] = nothing,
) -> list[Encoded]:
    """Encodes slides, each once; one that fails, or that takes its process down, stops no other.

    Args:
        executor: None: a process for each core for the built-in encoder, one for others, which use all cores.
        on_outcome: called as each slide ends.
        on_progress: called with patches done and in all, where one worker does one slide after the other.
        afterwards: called with each new feature file, in the process that wrote it, while the system still has it in
            memory. Its errors are warnings.

    Returns:
        In the order of the jobs.
    """
    executor = executor or LocalExecutor()
    encoder = load_encoder(encoder_name, executor.device_here(device))  # whatever is wrong with it is wrong once, here
    settings = settings.resolved(encoder)
    device = "cpu" if encoder_name == BUILT_IN else executor.device_there(device)
    fills_machine = encoder.on_gpu or encoder.input_px is not None
    outcomes: dict[Job, Encoded] = {}
    waiting: list[Job] = []
    notes: dict[Job, str] = {}
    why_anew: dict[Job, str] = {}

    def end(job: Job, outcome: Encoded) -> None:
        outcome = replace(outcome, reason=outcome.reason or why_anew.get(job, ""))
        if note := notes.get(job):
            outcome = replace(outcome, warning="; ".join(filter(None, (note, outcome.warning))))
        outcomes[job] = outcome
        on_outcome(outcome)

    for job, same in zip(jobs, _find_same(jobs, executor, fills_machine), strict=True):
        notes[job] = same.note
        if same.as_slide is not None:
            end(job, Encoded(str(job.slide), "skipped", reason=f"same slide as {same.as_slide}"))
            continue
        try:
            there = finished(job, encoder.id, settings)
        except SlideError as error:
            there = Encoded(str(job.slide), "failed", reason=str(error))
        if isinstance(there, str):
            waiting.append(job)
            why_anew[job] = there
        else:
            end(job, there)
    work = Work(
        partial(_encode_in_worker, settings=settings, afterwards=afterwards),
        _start_worker,
        (encoder_name, device),
        do_here=partial(_encode, encoder=encoder, settings=settings, afterwards=afterwards, on_progress=on_progress),
        fills_machine=fills_machine,
        device=device,
    )
    for job, outcome in executor.run(work, waiting):
        end(job, outcome or Encoded(str(job.slide), "failed", reason=crashed(job.slide)))
    return [outcomes[job] for job in jobs]


def _find_same(jobs: Sequence[Job], executor: Executor, fills_machine: bool) -> list[Sameness]:
    slides = [job.slide for job in jobs]
    if len(slides) < 2:
        return [Sameness() for _ in slides]
    most_workers = 1 + len(slides) // SLIDES_A_STARTER
    keys = dict(executor.run(Work(slide_key, fills_machine=fills_machine, most_workers=most_workers), slides))
    return find_same(slides, [keys[slide] for slide in slides])


def _encode(
    job: Job,
    encoder: PatchEncoder,
    settings: EncodeSettings,
    afterwards: Callable[[Path], None],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Encoded:
    began = time.perf_counter()
    try:
        result: EncodeResult = encode_slide(job.slide, job.out, encoder, settings, on_progress, job.qc)
    except Exception as error:  # the other slides go on
        return Encoded(str(job.slide), "failed", reason=why_failed(job.slide, error))
    seconds = round(time.perf_counter() - began, 2)
    share = None if result.tissue_share is None else round(result.tissue_share, 4)
    warnings = list(result.warnings)
    try:
        afterwards(job.out)
    except Exception as error:  # the feature file is whole
        warnings.append(why_failed(job.out, error))
    warning = "; ".join(warnings)
    return Encoded(str(job.slide), "done", result.num_patches, seconds, tissue_share=share, warning=warning)


_worker_encoder: PatchEncoder | None = None


def _start_worker(name: str, device: str) -> None:
    global _worker_encoder
    import torch

    torch.set_num_threads(1)
    _worker_encoder = load_encoder(name, device)


def _encode_in_worker(job: Job, settings: EncodeSettings, afterwards: Callable[[Path], None]) -> Encoded:
    assert _worker_encoder is not None
    return _encode(job, _worker_encoder, settings, afterwards)
