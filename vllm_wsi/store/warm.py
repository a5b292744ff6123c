"""Selects slides before anybody asks for them, so that no first question waits for a whole file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from vllm_wsi.errors import SlideError
from vllm_wsi.executors import Executor, LocalExecutor, Work
from vllm_wsi.model.checkpoint import load_selector
from vllm_wsi.selection.scorer import scorer_digest
from vllm_wsi.selection.scoring_device import Cpu
from vllm_wsi.slides.encoder_names import Mismatch
from vllm_wsi.slides.identity import is_store
from vllm_wsi.slides.many_slides import Outcome, crashed, why_failed
from vllm_wsi.slides.slide_names import walk_features

from .selection_store import SelectionStore
from .store_settings import StoreSettings
from .stored_selector import StoredSelector, scorer_name


@dataclass(frozen=True)
class WarmSettings:
    """Which selections a server will look for: those of its checkpoint, K, rule for encoders and device."""

    checkpoint: str
    store: StoreSettings
    k: int | None = None  # None: the checkpoint's
    encoder: str | None = None  # which features, where a file holds several
    device: str = "auto"
    encoder_mismatch: Mismatch = "refuse"

    def on(self, device: str) -> WarmSettings:
        """The same on another device."""
        return replace(self, device=device)


def find_features(paths: Iterable[Path]) -> list[Path]:
    """Feature files named singly or found below folders, each once.

    Raises:
        SlideError: a folder holds none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        files = list(walk_features(path)) if path.is_dir() and not is_store(path) else [path]
        if not files:
            raise SlideError(f"{path}: found no feature files, wanted at least one")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def warm_many(
    files: Sequence[Path],
    settings: WarmSettings,
    executor: Executor | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Selects slides that the store does not hold; one that fails, or that takes its process down, stops no other.

    Args:
        executor: None: a process for each core, or one where a GPU scores.
        on_outcome: called as each slide ends.

    Returns:
        In the order of the files.

    Raises:
        CheckpointError, SettingsError, SetupError: the checkpoint, the store or the device is not there.
    """
    executor = executor or LocalExecutor()
    selector = stored_selector(
        settings.on(executor.device_here(settings.device))
    )  # what is wrong with it is wrong once, here
    on_gpu = not isinstance(selector.selector.start(), Cpu)
    device = executor.device_there(settings.device)
    work = Work(partial(_warm, settings.on(device)), _one_thread, fills_machine=on_gpu, device=device)
    outcomes: dict[Path, Outcome] = {}
    for file, outcome in executor.run(work, files):
        outcomes[file] = outcome or Outcome(str(file), "failed", reason=crashed(file))
        on_outcome(outcomes[file])
    return [outcomes[file] for file in files]


def warming(settings: WarmSettings, executor: Executor) -> Callable[[Path], None]:
    """What selects one slide, in the process that has just written its features.

    Raises:
        CheckpointError, SettingsError, SetupError: the checkpoint, the store or the device is not there.
    """
    stored_selector(settings.on(executor.device_here(settings.device)))  # said before an hour of encoding
    return partial(_warm_file, settings.on(executor.device_there(settings.device)))


def _warm_file(settings: WarmSettings, file: Path) -> None:
    stored_selector(settings).select_file(file, settings.k, settings.encoder)


def _warm(settings: WarmSettings, file: Path) -> Outcome:
    began = time.perf_counter()
    try:
        found = stored_selector(settings).select_file(file, settings.k, settings.encoder)
    except Exception as error:  # the other slides go on
        return Outcome(str(file), "failed", reason=why_failed(file, error))
    num_patches, seconds = found.selection.num_patches, round(time.perf_counter() - began, 3)
    if found.source == "store":
        return Outcome(str(file), "skipped", num_patches, seconds, "is in the store already")
    return Outcome(str(file), "done", num_patches, seconds)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@cache
def stored_selector(settings: WarmSettings) -> StoredSelector:
    """Loaded once in each process.

    Raises:
        CheckpointError, SettingsError, SetupError: the checkpoint, the store or the device is not there.
    """
    selector = load_selector(settings.checkpoint, settings.device, encoder_mismatch=settings.encoder_mismatch)
    name = scorer_name(scorer_digest(selector.scorer), selector)
    return StoredSelector(selector, name, SelectionStore(*settings.store))
