"""Which feature file is a question's slide."""

from __future__ import annotations

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
            files = self._files(slide_name(Path(name).name))
            files = [file for file in files if file.parent == path.parent] or files
            if not files:
                raise NoFeaturesError(
                    f"found no features of slide {name!r} in {self._root.name}, wanted a feature file"
                )
            if len(files) > 1:
                found = ", ".join(str(file.relative_to(self._root)) for file in files)
                raise SlideError(f"found several files of slide {name!r} ({found}), wanted one")
            path = files[0]
        return FeaturePath(path)

    def _files(self, slide: str) -> list[Path]:
        names = list(names_of_slide(slide))
        found = [*(self._by_name.get(name) for name in names), *(self._by_image.get(name) for name in names)]
        return next((files for files in found if files), [])

    def names_of_case(self, case: str) -> list[str]:
        """Names of the slides of a case, or of a slide without its UUID: those that begin with the barcode."""
        return sorted(name for name in self._by_name if name.startswith((f"{case}-", f"{case}.")))
