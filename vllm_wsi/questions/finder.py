"""Which feature file is a question's slide."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_wsi.errors import SlideError
from vllm_wsi.files import IMAGE_SUFFIXES
from vllm_wsi.slides import FeatureFile, open_features
from vllm_wsi.slides.identity import is_store
from vllm_wsi.slides.slide_names import names_of_slide, slide_name, walk_features


class NoFeaturesError(SlideError):
    """A slide that no feature file is there for."""


@dataclass(frozen=True)
class FeaturePath:
    """A feature file on disk."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def open(self) -> FeatureFile:
        return open_features(self.path)


class FeatureFinder:
    """Feature files below a directory, by relative path or by name; hidden folders are not searched by name.

    A name with a folder below the directory is searched in that folder alone; a folder that is not there is left out,
    as questions are written where slides lie otherwise.

    Args:
        root: the directory.
        is_slide: whether a file is searched by name; None: all feature files are.
    """

    def __init__(self, root: Path, is_slide: Callable[[Path], bool] | None = None) -> None:
        self._root = root
        self._by_name: dict[str, list[Path]] = {}
        self._by_image: dict[str, list[Path]] = {}  # where the features' name is that of an image: a.ome.h5, a.svs.h5
        for path in filter(is_slide, walk_features(root)):
            name, *shorter = names_of_slide(slide_name(path.name))
            self._by_name.setdefault(name, []).append(path)
            for one in shorter:
                self._by_image.setdefault(one, []).append(path)

    def __call__(self, name: str) -> FeaturePath:
        path = self._root / name
        if not (path.is_file() or is_store(path)) or path.suffix.lower() in IMAGE_SUFFIXES:
            folder = _plain(path.parent)
            is_ours = self._is_folder_of_ours(folder)
            files = self._files(slide_name(Path(name).name), folder if is_ours else None)
            if not files:
                where = f"that folder of {self._root.name}" if is_ours else self._root.name
                raise NoFeaturesError(f"found no features of slide {name!r} in {where}, wanted a feature file")
            files = [file for file in files if _plain(file.parent) == folder] or files
            if len(files) > 1:
                found = ", ".join(str(file.relative_to(self._root)) for file in files)
                raise SlideError(f"found several files of slide {name!r} ({found}), wanted one")
            path = files[0]
        return FeaturePath(path)

    def _is_folder_of_ours(self, folder: Path) -> bool:
        """Whether a name's folder is one below the root, and not of the machine where the questions were written."""
        root = _plain(self._root)
        return folder != root and folder.is_relative_to(root) and folder.is_dir()

    def _files(self, slide: str, folder: Path | None) -> list[Path]:
        """Of the likeliest name that there are any of, in one folder or (None) in all."""
        names = list(names_of_slide(slide))
        for files in (index.get(name, []) for index in (self._by_name, self._by_image) for name in names):
            if found := [file for file in files if folder is None or _plain(file.parent) == folder]:
                return found
        return []

    def names_of_case(self, case: str) -> list[str]:
        """Names of the slides of a case, or of a slide without its UUID: those that begin with the barcode."""
        return sorted(name for name in self._by_name if name.startswith((f"{case}-", f"{case}.")))


def _plain(path: Path) -> Path:
    return Path(os.path.abspath(path))  # without "..", and links as they are named
