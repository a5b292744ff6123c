"""The feature file of a question's slide, and the URL under which a server reads it, whole or thinned to 32 patches.

The baselines random-32 and uniform-32 work with any server: the patches that their policy keeps are written as a
feature file of 32 rows, and a server whose K is 32 or more keeps every row of such a file. There is one difference
from a selection inside the server: with `position_ids: "original"` the patches have the positions 0 .. 31 and not
those of their places in the slide.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.questions.finder import FeatureFinder, NoFeaturesError
from vllm_wsi.slides import FeatureFile, SlideIdentity, open_features, write_features

NUM_KEPT = 32
POLICIES = ("random-32", "uniform-32")
"""The selection policies that are asked about as baselines; each keeps `NUM_KEPT` patches."""

DIGEST_ROWS = 16
"""Features made anew differ in every row, so that a few, evenly spread, tell them apart without reading the slide."""

THINNED_FROM = "thinned_from"  # key in a thinned file's metadata
THINNED_NAME = re.compile(r"\.(?:random-32-seed-?\d+|uniform-32)\.safetensors$")

WORK = ".vllm-wsi-eval"
"""The folder of thinned slides, below the features, where no other is given."""


@dataclass(frozen=True)
class SlideFile:
    """A feature file that was found and opened once."""

    path: Path
    num_patches: int
    encoder: str | None  # as the file says
    digest: str  # of up to `DIGEST_ROWS` rows of its features: other features have another one, wherever they lie


class SlideFiles:
    """Finds, opens and thins the slides of a benchmark; may be used from several threads.

    Args:
        features: directory of feature files, found by path or by name.
        url: the URL under which the server sees `features`; None: its own file:// URL.
        work: where thinned slides are written, below `features` for a server that reads nothing else; None: a hidden
            folder there.
        seed: of random-32.

    Raises:
        SlideError: `features` is no directory, or `url` is given and `work` does not lie below `features`.
    """

    def __init__(self, features: str | Path, url: str | None = None, work: str | Path | None = None, seed: int = 0):
        self.features = Path(features).resolve()
        if not self.features.is_dir():
            raise SlideError(f"{features}: found no directory, wanted one of feature files")
        self._work = Path(work).resolve() if work else self.features / WORK
        if url and not self._work.is_relative_to(self.features):
            raise SlideError(
                f"{work}: found a folder outside {features}, wanted one below it, as the server has its URL"
            )
        self._url = url.rstrip("/") if url else None
        self._seed = seed
        self._finder = FeatureFinder(self.features, is_slide=lambda path: not _is_thinned(path))
        self._lock = threading.Lock()
        self._open = cache(self._open_once)

    @property
    def common_root(self) -> Path:
        """The deepest folder that holds the features and what is made of them."""
        return Path(os.path.commonpath([self.features, self._work]))

    def find(self, name: str) -> SlideFile:
        """The file of a slide, also by its TCGA barcode without UUID, or of a TCGA case: its only slide, or only -DX1.

        Raises:
            NoFeaturesError: there is none.
            SlideError: there are several, or it cannot be used.
        """
        with self._lock:
            return self._open(name)

    def url(self, slide: SlideFile, policy: str | None = None) -> str:
        """What a request names: the slide, or its thinned file, which is written where it is not there yet.

        Args:
            policy: None: the whole slide; one of `POLICIES`: the 32 patches that it keeps.

        Raises:
            OSError: the thinned file cannot be written.
            SlideError: the slide has no patch with finite features.
        """
        path = slide.path
        if policy is not None:
            with self._lock:
                path = self._thinned(slide, policy)
        if self._url is None:
            return path.as_uri()
        return f"{self._url}/{quote(path.relative_to(self.features).as_posix())}"

    def _open_once(self, name: str) -> SlideFile:
        path = self._find_path(name)
        with open_features(path) as slide:
            return SlideFile(path, slide.num_patches, slide.metadata.get("encoder"), _digest(slide))

    def _find_path(self, name: str) -> Path:
        try:
            return self._finder(name).path
        except NoFeaturesError:
            if not re.fullmatch(r"TCGA-\w{2}-\w{4}(-\w{3}-\w{2}-\w{3,4})?", name) or not (
                names := self._finder.names_of_case(name)
            ):
                raise
        first = [one for one in names if "-DX1" in one]
        chosen = names if len(names) == 1 else first
        if len(chosen) != 1:
            raise SlideError(f"found several slides of case {name!r} ({', '.join(names)}), wanted one, or one -DX1")
        return self._finder(chosen[0]).path

    def _thinned(self, slide: SlideFile, policy_name: str) -> Path:
        from vllm_wsi.selection.baselines import RandomPolicy, UniformPolicy

        state = SlideIdentity.of_file(slide.path)
        source = f"{slide.path.name}:{state.size}:{state.mtime_ns}{state.content and f':{state.content}'}"
        is_random = policy_name == "random-32"
        suffix = f"{policy_name}-seed{self._seed}" if is_random else policy_name
        folder = self._work
        if slide.path.is_relative_to(self.features):
            folder /= slide.path.relative_to(self.features).parent
        out = folder / f"{slide.path.stem}.{suffix}.safetensors"
        if out.is_file():
            with open_features(out) as kept:
                if kept.metadata.get(THINNED_FROM) == source:
                    return out
        policy = RandomPolicy(NUM_KEPT, self._seed) if is_random else UniformPolicy(NUM_KEPT)
        with open_features(slide.path) as file:
            selection = policy.select(file)
            rows = selection.indices.numpy()
            features = selection.features
            features = features.numpy() if features.dtype.itemsize != 2 else features.float().numpy()
            note = {THINNED_FROM: source, "thinned_by": suffix}
            folder.mkdir(parents=True, exist_ok=True)
            write_features(out, features, _pixel_coords(file, rows), {**file.metadata, **note})
        return out


def _is_thinned(path: Path) -> bool:
    """Whether an earlier run, with whatever `work`, wrote that file: it is no slide of its own."""
    if not THINNED_NAME.search(path.name):
        return False
    try:
        with open_features(path) as file:
            return THINNED_FROM in file.metadata
    except SlideError:
        return False  # says what is wrong with it where it is asked for


def _digest(file: FeatureFile) -> str:
    from vllm_wsi.selection.evenly_spaced import evenly_spaced  # imports torch

    rows = evenly_spaced(DIGEST_ROWS, file.num_patches).numpy()
    shape = f"{file.num_patches} x {file.feature_dim} {file.dtype}"
    return hashlib.sha256(shape.encode() + file.read_at(rows).tobytes()).hexdigest()[:16]


def _pixel_coords(file: FeatureFile, rows: NDArray[np.int64]) -> NDArray | None:
    """[k, 2], the patches' places where they are whole pixels for certain; a thinned file could not record a guess."""
    if file.coord_unit != "px" or file.unit_source == "guess":
        return None
    coords = file.read_coords()
    kept = None if coords is None else np.asarray(coords)[rows]
    return kept if kept is not None and np.array_equal(kept, np.round(kept)) else None
