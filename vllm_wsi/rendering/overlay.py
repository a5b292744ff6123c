"""A selection as files: GeoJSON, heat map and montage, upon the slide's image where it is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SlideError
from vllm_wsi.files import write_atomically
from vllm_wsi.selection.selection import NOTHING_SAID, Selection
from vllm_wsi.slides.places import Said, origin, refuse_guesses, with_image_mpp
from vllm_wsi.slides.regions import check_image, extent

from .geojson import geojson

if TYPE_CHECKING:
    from openslide import AbstractSlide


class SelectionOverlay:
    """What the decoder was shown of one slide; close it, or use it in a `with`.

    Args:
        selection: with `all_scores` where a heat map is wanted.
        name: of the feature file, as errors and GeoJSON ids name it.
        image_path: the slide image; None: pictures are drawn from the coordinates alone.
        said: by the user of the patches' places; mpp is otherwise the feature file's, or the image's where coordinates
            are in microns.

    Raises:
        SlideError: patches cannot be placed, or only by a guess upon an image, or the image is not the one that was
            encoded.
    """

    def __init__(
        self, selection: Selection, name: str, image_path: Path | None = None, said: Said = NOTHING_SAID
    ) -> None:
        self._selection, self._name, self._image_name = selection, name, str(image_path)
        self._said = said
        self._image: AbstractSlide | None = None
        if image_path is not None:
            from vllm_wsi.encoding.image import open_image

            self._image = open_image(image_path)
        try:
            self._said = self._with_mpp()
            self.rects = selection.rects(name, self._said)
            self.size_px = self._extent()
        except SlideError:
            self.close()
            raise

    def _extent(self) -> tuple[float, float]:
        metadata = self._selection.metadata
        rects = self.rects if self._selection.all_scores is None else self._all_rects()
        if self._image is None:
            return extent(rects, metadata)
        check_image(self._image_name, self._image.dimensions, self._name, metadata, rects)
        return self._image.dimensions

    def _with_mpp(self) -> Said:
        """What the user says, and the image's mpp where coordinates are in microns and nothing else says it."""
        unit, _ = self._selection.settle(self._name, self._said)
        image = self._image
        if image is None or unit is None or unit.unit != "um":
            return self._said
        from vllm_wsi.encoding.image import image_mpp

        return with_image_mpp(self._said, self._selection.metadata, lambda: image_mpp(image, self._image_name))

    def _all_rects(self):
        return self._selection.all_rects(self._name, self._said)

    def _refuse_guesses(self) -> None:
        if self._image is not None:
            refuse_guesses(self._name, self._selection.guesses(self._name, self._said))

    def write_geojson(self, path: Path, cropped: bool = True) -> None:
        """Kept patches for QuPath; `cropped`: counted from the origin of the slide's bounds, as QuPath does."""
        chosen = self._selection
        unit, size = chosen.settle(self._name, self._said)
        assert unit is not None  # or there were no rectangles
        assert size is not None
        begin = origin(self._name, chosen.metadata, None if self._image is None else self._image.properties)
        scores, rows = chosen.scores.tolist(), chosen.indices.tolist()
        collection = geojson(self.rects, scores, rows, self._name, unit, size, begin, cropped)
        write_atomically(path, json.dumps(collection, indent=1).encode())

    def write_heatmap(self, path: Path) -> None:
        """PNG of all scores by their rank, kept patches outlined."""
        from vllm_wsi.encoding.image import thumbnail
        from vllm_wsi.encoding.png import write_png

        from .pictures import HEAT_SIDE, heat_map, heat_overlay

        assert self._selection.all_scores is not None
        self._refuse_guesses()
        overlay = heat_overlay(self._all_rects(), self._selection.all_scores.numpy(), self.size_px)
        under = None if self._image is None else thumbnail(self._image, self._image_name, HEAT_SIDE)
        write_png(path, heat_map(overlay, under, self.rects, self.size_px))

    def write_montage(self, path: Path) -> None:
        """PNG of the kept patches, best first."""
        from vllm_wsi.encoding.png import write_png

        from .pictures import montage

        self._refuse_guesses()
        scores, rows = self._selection.scores.tolist(), self._selection.indices.tolist()
        read = None if self._image is None else self._read_patch
        write_png(path, montage(self.rects, scores, rows, self.size_px, read))

    def _read_patch(self, rect: tuple[float, float, float, float], edge: int) -> NDArray[np.uint8]:
        from vllm_wsi.encoding.image import read_scaled

        assert self._image is not None
        return read_scaled(self._image, self._image_name, *rect, (edge, edge))

    def close(self) -> None:
        if self._image is not None:
            self._image.close()

    def __enter__(self) -> SelectionOverlay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
