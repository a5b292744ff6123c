"""Slides pooled from real patches of many patients, natural slides of one patient, and the near-whole slide.

All are views of features in memory: no file is written. Each knows which of its rows are tumour (`key_patches`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_wsi.errors import SettingsError
from vllm_wsi.slides import FeatureFile, SlideIdentity
from vllm_wsi.slides.feature_file import Unit

from .tissue_patches import PATCH_MPP, PATCH_PX


@dataclass(frozen=True, eq=False)
class PatchPool:
    """Encoded patches that slides are pooled from: one side of a fold.

    Args:
        name: of the pool, unique among pools: slides are named after it.
        encoder: id@revision, as feature files record it.
        views: features float16 [n, d] of each view; all views hold the same patches.
        labels: [n]: bool, True for tumour; or the number of each patch's class.
        patients: [n], or slides where there is one of each patient.
        coords_px: int64 [n, 2], places on each patient's own slide.
        rows: int64, those of the n patches that are in this pool, ascending.
        patch_px, mpp: edge of a patch in pixels, and micrometres per pixel.
    """

    name: str
    encoder: str
    views: tuple[NDArray[np.float16], ...]
    labels: NDArray[Any]
    patients: NDArray[np.str_]
    coords_px: NDArray[np.int64]
    rows: NDArray[np.int64]
    patch_px: int = PATCH_PX
    mpp: float = PATCH_MPP

    @property
    def feature_dim(self) -> int:
        return self.views[0].shape[1]

    @cached_property
    def tumour(self) -> NDArray[np.int64]:
        """Rows of the pool whose label is True."""
        return self.of_label(True)

    @cached_property
    def other(self) -> NDArray[np.int64]:
        """Rows of the pool whose label is False."""
        return self.of_label(False)

    def of_label(self, label: bool | int) -> NDArray[np.int64]:
        """Rows of the pool with a label, ascending."""
        return self.rows[self.labels[self.rows] == label]

    def most_patches(self, share: float) -> int:
        """The longest slide of this share of tumour on which no patch stands twice."""
        limits = [int(len(self.other) / (1 - share) + 1e-9)] if share < 1 else []
        limits += [int(len(self.tumour) / share + 1e-9)] if share > 0 else []
        return min(limits)


class Drawn(NamedTuple):
    """The patches of a slide, in the order of its rows."""

    rows: NDArray[np.int64]  # [N], of the pool's features
    views: NDArray[np.int64]  # [N]
    coords_px: NDArray[np.int64]  # [N, 2]


class TissueSlide:
    """What all slides here have in common: a `SlideSource` whose features are gathered when they are read.

    Args:
        pool: where its patches are from.
        name: the same name means the same slide.
        num_patches: N.
    """

    def __init__(self, pool: PatchPool, name: str, num_patches: int) -> None:
        self.pool, self.name, self.num_patches = pool, name, num_patches

    def draw(self) -> Drawn:
        """Which patches the slide holds; the same at every call."""
        raise NotImplementedError

    def lots(self) -> np.random.Generator:
        """Random numbers that follow from the slide's name."""
        seed = hashlib.blake2b(self.name.encode(), digest_size=16).digest()
        return np.random.default_rng(int.from_bytes(seed, "little"))

    def grid_px(self) -> NDArray[np.int64]:
        """[N, 2] places on a square grid, row by row."""
        width = int(np.ceil(np.sqrt(self.num_patches)))
        places = np.arange(self.num_patches)
        return np.stack((places % width, places // width), axis=1) * self.pool.patch_px

    def labels(self) -> NDArray[Any]:
        """[N] the label of each patch, as the pool has them."""
        return self.pool.labels[self.draw().rows]

    @property
    def num_repeated(self) -> int:
        """Patches that stand on the slide a second time or more, flipped and restained."""
        rows = self.draw().rows
        return len(rows) - len(np.unique(rows))

    def open(self) -> FeatureFile:
        """The slide as an open feature file: patches are drawn when it is opened, and gathered when they are read."""
        drawn, pool = self.draw(), self.pool
        width, height = (int(end) + pool.patch_px for end in drawn.coords_px.max(axis=0))
        digest = hashlib.blake2b(f"{pool.encoder} {self.name}".encode(), digest_size=20).hexdigest()
        return FeatureFile(
            name=self.name,
            format="tissue",
            key="",
            num_patches=self.num_patches,
            feature_dim=pool.feature_dim,
            dtype="float16",
            rows=_GatheredRows(pool, drawn),
            identity=SlideIdentity(f"memory:{digest}", self.num_patches * pool.feature_dim * 2),
            metadata={
                "slide_id": self.name,
                "encoder": pool.encoder,
                "patch_size_level0": str(pool.patch_px),
                "mpp": str(pool.mpp),
                "width": str(width),
                "height": str(height),
            },
            unit=Unit("px", "file"),
            load_coords=lambda: drawn.coords_px,
        )


class _GatheredRows:
    """A `RowSource` that takes each row from the view and the patch that were drawn."""

    near_rows = 1  # in memory: rows between cost nothing to leave out

    def __init__(self, pool: PatchPool, drawn: Drawn) -> None:
        self._pool, self._drawn = pool, drawn

    def read_into(self, start: int, out: NDArray) -> None:
        rows, views = (one[start : start + len(out)] for one in (self._drawn.rows, self._drawn.views))
        for view in np.unique(views):
            of_view = views == view
            out[of_view] = self._pool.views[view][rows[of_view]]

    def close(self) -> None:
        pass


class TumourSlide(TissueSlide):
    """A slide of a pool whose labels say what is tumour."""

    @property
    def key_patches(self) -> NDArray[np.int64]:
        """Rows of the slide that are tumour, ascending; none on a slide without tumour."""
        return np.flatnonzero(self.labels())

    @property
    def share(self) -> float:
        """Share of the slide's patches that are tumour, in [0, 1]."""
        return len(self.key_patches) / self.num_patches


class PooledSlide(TumourSlide):
    """N patches drawn from all patients of a pool, in random order on a square grid.

    No patch stands twice on a slide while there are enough of its kind (tumour or not) in the pool. A longer slide
    takes each of them again in another view, flipped and restained (`num_repeated` says how many), and no view twice.

    Args:
        share: of tumour; round(share * N) patches, and at least one where the share is above 0.
        number: of the slide; with the pool, N and the share the seed of its lots.
        any_view: draws every patch in any view, as training does; else view 0 is used up first.

    Raises:
        SettingsError: the pool has too few patches of a kind, also with all views.
    """

    def __init__(self, pool: PatchPool, num_patches: int, share: float, number: int, any_view: bool = False) -> None:
        num_tumour = max(round(share * num_patches), int(share > 0))
        name = f"{pool.name}-{num_patches}-{num_tumour}-{number}{'-any' if any_view else ''}"
        super().__init__(pool, name, num_patches)
        self.num_tumour, self.any_view = num_tumour, any_view
        for kind, rows, wanted in (
            ("tumour", pool.tumour, num_tumour),
            ("other", pool.other, num_patches - num_tumour),
        ):
            most = len(rows) * len(pool.views)
            if wanted > most:
                raise SettingsError(
                    f"num_patches: found {num_patches} with a share of {share:g}, wanted at most {most} {kind} "
                    f"patches: {pool.name} has {len(rows)} in {len(pool.views)} views"
                )

    @property
    def share(self) -> float:
        return self.num_tumour / self.num_patches  # what is drawn has as many

    def draw(self) -> Drawn:
        rng = self.lots()
        kinds = ((self.pool.tumour, self.num_tumour), (self.pool.other, self.num_patches - self.num_tumour))
        rows, views = (np.concatenate(parts) for parts in zip(*(self._lots(rng, *kind) for kind in kinds), strict=True))
        order = rng.permutation(self.num_patches)
        return Drawn(rows[order], views[order], self.grid_px())

    def _lots(
        self, rng: np.random.Generator, rows: NDArray[np.int64], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows, views) of `count` patches: whole rounds of all rows, then some of them, each round in other views."""
        if not count:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        num_views = len(self.pool.views)
        rounds, rest = divmod(count, len(rows))
        chosen = np.concatenate([np.tile(rows, rounds), rng.permutation(rows)[:rest]])
        number = np.arange(count) // len(rows)
        if not self.any_view:
            return chosen, number
        # A patch's views in the rounds are its own first view and those that follow it, so that no view comes twice.
        first = rng.integers(num_views, size=len(self.pool.labels))
        return chosen, (first[chosen] + number) % num_views


class NaturalSlide(TumourSlide):
    """All patches of one patient, at their places on its slide, in view 0. They are a sample of the slide's tissue.

    Args:
        patient: that the pool holds.
    """

    def __init__(self, pool: PatchPool, patient: str) -> None:
        self._rows = pool.rows[pool.patients[pool.rows] == patient]
        if not len(self._rows):
            raise SettingsError(f"patient: found {patient!r}, wanted one of {pool.name}")
        super().__init__(pool, f"{pool.name}-patient-{patient}", len(self._rows))

    def draw(self) -> Drawn:
        coords = self.pool.coords_px[self._rows]
        return Drawn(self._rows, np.zeros(len(self._rows), np.int64), coords)


def natural_slides(pool: PatchPool, least: int = 1) -> list[NaturalSlide]:
    """One slide of each patient who has at least `least` patches, by the patients' names."""
    names, counts = np.unique(pool.patients[pool.rows], return_counts=True)
    return [NaturalSlide(pool, name) for name in names[counts >= least].tolist()]
