"""The look at every slide before training begins: by one process, and once for files that do not change."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from vllm_wsi.errors import SetupError, SlideError
from vllm_wsi.files import write_atomically
from vllm_wsi.questions.finder import FeaturePath
from vllm_wsi.questions.items import SlideSource
from vllm_wsi.selection.chunk_reader import ChunkReader
from vllm_wsi.slides import FeatureFile, SlideIdentity
from vllm_wsi.slides.encoder_names import recorded_encoder
from vllm_wsi.slides.places import said_patch_um

from .slide_reading import draw_from_strata, finite_rows, no_finite_patch

T = TypeVar("T")
SIGN_OF_LIFE = 30.0  # seconds between the main process's messages: a group's processes give up after ten minutes
SLOW_FORMATS = ("SlideChat csv",)  # text, whose numbers are parsed anew in each epoch
VERSION = 2  # of the file in which slides are remembered


class SlideFacts(NamedTuple):
    """What a check must know of one slide."""

    name: str  # as errors name it
    format: str
    num_patches: int  # N
    feature_dim: int  # d
    encoder: str | None  # as the file names it
    patch_um: float | None  # edge of a patch, as the file says it
    was_read: bool  # all of it, and some patch of it is finite


class SlideMemory:
    """Facts about slides that were looked at, as long as their files stay as they are.

    Args:
        path: JSON file that keeps them from run to run; None: they are kept in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, tuple[SlideIdentity, SlideFacts]] = {}
        if path is not None and path.exists():
            try:
                said = json.loads(path.read_text())
                if said["version"] == VERSION:
                    pairs = [(SlideIdentity(*one), SlideFacts(*facts)) for one, facts in said["slides"]]
                    self._known = {identity.path: (identity, facts) for identity, facts in pairs}
            except (ValueError, TypeError, KeyError):  # damaged: the slides are read again
                self._known = {}

    def facts(self, source: SlideSource, read: bool) -> SlideFacts:
        """Opens the slide, or remembers it.

        Args:
            read: it is also read once through.

        Raises:
            SlideError, OSError: it cannot be used; that is not remembered.
        """
        if isinstance(source, FeaturePath):
            identity = SlideIdentity.of_file(source.path)
            known = self._known.get(identity.path)
            if known is not None and known[0] == identity and (known[1].was_read or not read):
                return known[1]
        with source.open() as slide:
            facts = SlideFacts(
                slide.name,
                slide.format,
                slide.num_patches,
                slide.feature_dim,
                recorded_encoder(slide.metadata),
                said_patch_um(slide.name, slide.metadata),
                read,
            )
            if read and not _has_finite_patch(slide):
                raise SlideError(no_finite_patch(source.name))
            if isinstance(source, FeaturePath):
                self._known[slide.identity.path] = slide.identity, facts
        return facts

    def save(self) -> None:
        """Writes what is known, whole or not at all."""
        if self._path is not None:
            text = json.dumps({"version": VERSION, "slides": list(self._known.values())}, indent=0)
            write_atomically(self._path, text.encode("utf-8", "surrogateescape"))


def _has_finite_patch(slide: FeatureFile) -> bool:
    """Reads all of it: a slide that is cut short is found too."""
    found = False
    for _, chunk in ChunkReader(slide).chunks():
        found |= bool(finite_rows(chunk).any())
    return found


def slow_reading(source: SlideSource, max_patches: int) -> str:
    """What converting would save of each reading of a slide of a slow format, in one sentence.

    Measured on the slide itself: the reading of as many patches as training takes of it, beside that of as many plain
    bytes as they are in safetensors.
    """
    began = time.perf_counter()
    with source.open() as slide:
        rows = slide.read_at(draw_from_strata(max_patches, slide.num_patches, np.random.default_rng(0)))
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    with open(slide.identity.path, "rb", buffering=0) as file:
        file.read(rows.nbytes)
    plain = time.perf_counter() - began
    return (
        f"{source.name} is a {slide.format}: its {len(rows):,} patches took {seconds:.2g} s to read, and as many bytes "
        f"of safetensors {plain:.2g} s, for each question in each epoch; `vllm-wsi convert FEATURES --out DIR` "
        "rewrites such files once"
    )


def on_main_process(processes: PartialState, work: Callable[[], T]) -> T:
    """What the main process's `work` returns, on all of them; it is done there alone, however long it takes.

    Raises:
        Exception: of `work`, in the main process.
        SetupError: the same sentence, in the others.
    """
    if processes.num_processes == 1:
        return work()
    box: list[tuple[bool, T | None, str]] = [(False, None, "")]  # is done, result, error
    if not processes.is_main_process:
        while not box[0][0]:
            broadcast_object_list(box)
        _, result, error = box[0]
        if error:
            raise SetupError(error)
        return result  # type: ignore[return-value]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not wait_for([future], SIGN_OF_LIFE).done:
            broadcast_object_list(box)
    failure = future.exception()
    error = "" if failure is None else str(failure) or type(failure).__name__
    box[0] = True, None if failure else future.result(), error
    broadcast_object_list(box)
    return future.result()
