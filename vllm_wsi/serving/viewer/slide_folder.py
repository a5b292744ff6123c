"""Which slides lie below the allowed path, and which slide image belongs to which feature file."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

from vllm_wsi.errors import SlideError, encodable
from vllm_wsi.files import IMAGE_SUFFIXES, QC_SUFFIX
from vllm_wsi.slides.slide_names import image_names, is_feature_file, is_feature_store, slide_name

MAX_ENTRIES = 10_000  # files and folders that one listing looks at
MAX_DEPTH = 8  # folders below the allowed path


def image_suffixes() -> frozenset[str]:
    """Of slide images; none where the extra `slides` is not installed."""
    try:
        import vllm_wsi.encoding.image  # noqa: F401
    except ImportError:
        return frozenset()
    return IMAGE_SUFFIXES


def list_slides(root: Path) -> dict[str, Any]:
    """Feature files and zarr stores below a folder, each with whether one slide image of its name lies beside it.

    Hidden files are left out, and so are links that lead out of the folder; links to folders are not followed.

    Returns:
        {"slides": [{"name": path relative to root, "url": file URL, "has_image"}, ..] by name, "truncated": whether
        `MAX_ENTRIES` or `MAX_DEPTH` ended the search}.
    """
    root = root.resolve()
    images = image_suffixes()
    slides: list[dict[str, Any]] = []
    folders = deque([(root, 0)])
    seen, truncated = 0, False
    while folders and seen <= MAX_ENTRIES:
        folder, depth = folders.popleft()
        features: list[Path] = []
        pictures: set[str] = set()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MAX_ENTRIES:
                        truncated = True
                        break
                    path = Path(entry.path)
                    suffix = path.suffix.lower()
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        if is_feature_store(path):
                            features.append(path)
                        elif depth < MAX_DEPTH:
                            folders.append((path, depth + 1))
                        else:
                            truncated = True
                    elif not _is_file_below(entry, root):
                        continue
                    elif suffix in images:
                        pictures.add(entry.name)
                    elif _is_feature_file(path):
                        features.append(path)
        except OSError:  # a folder that may not be read, or that went away
            pass
        for path in features:
            name = path.relative_to(root).as_posix()
            if encodable(name) != name:  # no URL names it
                continue
            found = pictures.intersection(image_names(slide_name(path.name), images))
            slides.append({"name": name, "url": path.as_uri(), "has_image": len(found) == 1})
    slides.sort(key=lambda slide: slide["name"])
    return {"slides": slides, "truncated": truncated}


def _is_feature_file(path: Path) -> bool:
    try:
        return is_feature_file(path)
    except OSError:
        return False


def _is_file_below(entry: os.DirEntry[str], root: Path) -> bool:
    try:
        return entry.is_file() and (not entry.is_symlink() or root in Path(entry.path).resolve().parents)
    except (OSError, RuntimeError):  # a loop of links
        return False


def qc_picture_of(features: Path, root: Path) -> Path | None:
    """The picture of tissue and patches that `encode --qc` wrote beside a feature file; None where there is none.

    Raises:
        SlideError: it is a link that leads out of `root`.
    """
    path = features.with_suffix(QC_SUFFIX)
    if not path.is_file():
        return None
    if root not in path.resolve().parents:
        raise SlideError(f"{path.name}: found a link out of --allowed-local-media-path, wanted a picture below it")
    return path.resolve()


def image_of(features: Path, root: Path) -> Path | None:
    """The slide image beside features that has their name, links followed; None where there is none.

    Raises:
        SlideError: there are several, or it is a link that leads out of `root`.
    """
    names = image_names(slide_name(features.name), image_suffixes())
    found = {path.name: path for path in map(features.with_name, names) if path.is_file()}
    if len({path.resolve() for path in found.values()}) > 1:
        raise SlideError(f"{features.name}: found several slide images beside it ({', '.join(found)}), wanted one")
    for path in found.values():
        # A MIRAX slide is a file and the folder of its name.
        parts = [path, path.with_suffix("")] if path.suffix.lower() == ".mrxs" else [path]
        if any(root not in part.resolve().parents for part in parts):
            raise SlideError(
                f"{path.name}: found a link out of --allowed-local-media-path, wanted a slide image below it"
            )
        return path.resolve()
    return None
