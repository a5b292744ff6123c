"""What the serving benchmark asks: virtual slides on disk, and `custom_image` data sets of questions about them."""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from vllm_wsi.slides.synthetic import write_synthetic_slide

MEDIAN_PATCHES, SIGMA, LEAST_PATCHES, MOST_PATCHES = 20_000, 1.0, 1_000, 1_000_000
QUESTION = " Which tumour is present on this slide, of which grade, and which of its regions show it best?"


def log_normal_sizes(count: int, most: int = MOST_PATCHES, seed: int = 0) -> list[int]:
    """N of `count` slides, shuffled: the quantiles of a log-normal law around 20,000, but for the largest, `most`."""
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    sizes = [int(np.clip(MEDIAN_PATCHES * np.exp(SIGMA * z), LEAST_PATCHES, most)) for z in quantiles]
    sizes[-1] = most
    np.random.default_rng(seed).shuffle(sizes)
    return sizes


def zipf_picks(num_slides: int, requests: int, seed: int = 0) -> list[int]:
    """Which slide each request asks about: the slide of rank r with a share of 1 / r."""
    shares = 1 / np.arange(1, num_slides + 1)
    return np.random.default_rng(seed).choice(num_slides, requests, p=shares / shares.sum()).tolist()


@dataclass(frozen=True)
class Asked:
    """One data set: a question in each row, about the slide of a URL or about none."""

    path: Path
    requests: int
    body_bytes: float  # mean size of a row: what a client sends


class Workload:
    """Slides of a folder, and data sets that ask about them.

    Unless it says `known`, a data set asks about slides that the server has never seen: hard links, whose paths, and so
    whose identities, are new while their bytes stay in the page cache. Every question begins with a number of its own.
    """

    def __init__(self, folder: Path, feature_dim: int, dtype: str = "float16") -> None:
        self.folder, self.feature_dim, self._dtype = folder, feature_dim, dtype
        self._numbers, self._sets = itertools.count(), itertools.count()

    def slides(self, sizes: Iterable[int], name: str) -> list[Path]:
        """Writes one slide for each N, and reads it once."""
        paths = []
        for i, n in enumerate(sizes):
            path = self.folder / f"{name}-{i}-{n}.safetensors"
            write_synthetic_slide(path, n, self.feature_dim, seed=i, dtype=self._dtype)
            sync_and_read(path)
            paths.append(path)
        return paths

    def text(self, requests: int) -> Asked:
        return self._write([None] * requests)

    def ask(self, slides: Sequence[Path], picks: Sequence[int], k: int | None = None, known: bool = False) -> Asked:
        """Questions about `slides[pick]`, by reference, of K slide tokens (None: the server's own K).

        Args:
            known: about the slides themselves, which the server knows from the second such data set on. Ask no other
                about them: a link to a file changes its inode, and then the slide counts as new.
        """
        named = dict(enumerate(slides)) if known else self._fresh(slides, picks)
        fragment = "" if k is None else f"#k={k}"
        return self._write([named[pick].as_uri() + fragment for pick in picks])

    def ask_by_value(self, slides: Sequence[Path], picks: Sequence[int], k: int | None = None) -> Asked:
        """The same as data URLs: each request carries the whole feature file."""
        # vLLM's data set takes data URLs of images alone; the plugin goes by the content.
        fragment = "" if k is None else f"#k={k}"
        values = {
            pick: "data:image/x-wsi;base64," + base64.b64encode(slides[pick].read_bytes()).decode() + fragment
            for pick in set(picks)
        }
        return self._write([values[pick] for pick in picks])

    def _fresh(self, slides: Sequence[Path], picks: Sequence[int]) -> dict[int, Path]:
        folder = self.folder / f"links-{next(self._sets)}"
        folder.mkdir()
        links = {pick: folder / f"{pick}-{slides[pick].name}" for pick in set(picks)}
        for pick, link in links.items():
            os.link(slides[pick], link)
        return links

    def _write(self, urls: Sequence[str | None]) -> Asked:
        path = self.folder / f"questions-{next(self._sets)}.jsonl"
        size = 0
        with open(path, "w") as file:
            for url in urls:
                content: list[dict] = [{"type": "text", "text": f"{next(self._numbers):06d}{QUESTION}"}]
                if url is not None:
                    content.insert(0, {"type": "image_url", "image_url": {"url": url}})
                size += file.write(json.dumps({"content": content}) + "\n")
        return Asked(path, len(urls), size / len(urls))


def sync_and_read(path: Path) -> None:
    """On disk and in the page cache: no write-back disturbs what is measured next."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while file.read(1 << 24):
            pass
