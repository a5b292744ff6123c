"""Selects a slide with the help of a store: from its selection, from its scores, or from its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from vllm_wsi.errors import SlideError
from vllm_wsi.selection.selection import Selection
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import FeatureFile, SlideIdentity, open_features
from vllm_wsi.slides.encoder_names import EncoderCheck

from .selection_key import SelectionKey
from .selection_store import SelectionStore

Source = Literal["store", "stored scores", "file"]


class Selected(NamedTuple):
    """A selection, and where it came from."""

    selection: Selection
    source: Source


class StoredSelector:
    """A `SlideSelector` beside a store.

    Args:
        scorer: digest of the selector's scorer, and its rule for encoders.
        store: None: every slide is read.
    """

    def __init__(self, selector: SlideSelector, scorer: str, store: SelectionStore | None = None) -> None:
        self.selector, self.scorer, self.store = selector, scorer, store

    def select_file(self, path: Path, k: int | None = None, encoder: str | None = None) -> Selected:
        """As a server with this checkpoint selects a file of a `file://` URL.

        Args:
            k: None: the selector's.
            encoder: which features, where a file holds several.
        """
        identity = SlideIdentity.of_file(path)
        key = SelectionKey(identity, encoder, self.scorer, self.selector.start().name)
        opened = partial(
            unchanged, partial(open_features, path, encoder), partial(SlideIdentity.of_file, path), identity
        )
        return self.select(key, opened, self.selector.num_slide_tokens if k is None else k)

    # Many parameters: what is asked of a slide, and how it is opened and waited for.
    def select(
        self,
        key: SelectionKey,
        open_slide: Callable[[], AbstractContextManager[FeatureFile]],
        k: int,
        keep_all_scores: bool = False,
        waiting: Callable[[], None] = lambda: None,
    ) -> Selected:
        """Keeps the best k patches.

        Args:
            key: of the slide; its scorer is this one's, its device the one that scores now.
            open_slide: opens the slide for a `with`, and raises at its end where it is not in the state of the key.
            keep_all_scores: as `SlideSelector.select` has it.
            waiting: called again and again while another process selects this slide; may raise.

        Raises:
            SlideError: as `SlideSelector.select` and `open_slide` do.
        """
        store = self.store
        if store is None:
            with open_slide() as slide:
                return Selected(self.selector.select(slide, k, keep_all_scores), "file")
        if not keep_all_scores and (found := self.stored(key, k)) is not None:
            return Selected(found, "store")
        with store.alone(key.of_scores(), waiting):
            if not keep_all_scores and (found := self.stored(key, k, count_miss=False)) is not None:
                return Selected(found, "store")
            return self._select_and_save(store, key, open_slide, k, keep_all_scores)

    def stored(self, key: SelectionKey, k: int, count_miss: bool = True) -> Selection | None:
        """The k best, where the store has them; the slide is not needed."""
        found = None if self.store is None else self.store.load_selection(key.of_selection(k), count_miss)
        if found is not None and (found.features.shape[1] != self.selector.feature_dim or len(found.indices) > k):
            return None
        return found

    def _select_and_save(
        self,
        store: SelectionStore,
        key: SelectionKey,
        open_slide: Callable[[], AbstractContextManager[FeatureFile]],
        k: int,
        keep_all_scores: bool,
    ) -> Selected:
        scores = store.load_scores(key.of_scores())
        with open_slide() as slide:
            if scores is None or len(scores) != slide.num_patches:
                scores = None
                selection = self.selector.select(slide, k, keep_all_scores=True)
            else:
                selection = self.selector.select_by_scores(slide, scores, k, key.scored_on)
        # Only now is it sure that the slide did not change meanwhile.
        key = key._replace(scored_on=selection.scored_on)
        if scores is None:
            assert selection.all_scores is not None
            store.save_scores(key.of_scores(), selection.all_scores)
        store.save_selection(key.of_selection(k), selection)
        if not keep_all_scores:
            selection = replace(selection, all_scores=None, all_coords=None)
        return Selected(selection, "file" if scores is None else "stored scores")


def scorer_name(digest: str, encoder: EncoderCheck, max_patches: int | None) -> str:
    """Of a scorer by the digest of its weights, and of the rules by which slides are refused."""
    return f"{digest}:{encoder}, at most {max_patches} patches"


@contextmanager
def unchanged(
    open_slide: Callable[[], FeatureFile], now: Callable[[], SlideIdentity], wanted: SlideIdentity
) -> Iterator[FeatureFile]:
    """An open slide. Raises SlideError at both ends where its file is not in the state that is wanted."""
    with open_slide() as slide:
        if slide.identity != wanted or now() != wanted:
            raise SlideError(f"{slide.name}: the file changed while it was opened; ask again")
        yield slide
    if now() != wanted:
        raise SlideError(f"{slide.name}: the file changed while it was read; ask again")
