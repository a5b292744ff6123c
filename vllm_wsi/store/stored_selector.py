"""Selects a slide with the help of a store: from its selection, from its scores, or from its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from vllm_wsi.errors import SlideError
from vllm_wsi.selection.question_scorer import QuestionScorer
from vllm_wsi.selection.question_selection import Question
from vllm_wsi.selection.selection import Selection
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.selection.slide_pools import SlideScores
from vllm_wsi.slides import FeatureFile, SlideIdentity, open_features

from .selection_key import SelectionKey
from .selection_store import SelectionStore
from .vector_cache import SlideVectorCache

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
        self._vectors = SlideVectorCache()

    def select_file(self, path: Path, k: int | None = None, encoder: str | None = None) -> Selected:
        """As a server with this checkpoint selects a file of a `file://` URL, without a question.

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
        question: Question | None = None,
    ) -> Selected:
        """Keeps the best k patches.

        Args:
            key: of the slide; its scorer is this one's, its device the one that scores now.
            open_slide: opens the slide for a `with`, and raises at its end where it is not in the state of the key.
            keep_all_scores: as `SlideSelector.select` has it.
            waiting: called again and again while this slide is read for another question, or by another process; may
                raise.
            question: for a `QuestionScorer`.

        Raises:
            SlideError: as `SlideSelector.select` and `open_slide` do.
        """
        if self.store is None and not isinstance(self.selector.scorer, QuestionScorer):
            with open_slide() as slide:
                return Selected(self.selector.select(slide, k, keep_all_scores), "file")
        if not keep_all_scores and (found := self.stored(key, k, question=question)) is not None:
            return Selected(found, "store")
        with self._alone(key, waiting):
            if not keep_all_scores and (found := self.stored(key, k, False, question)) is not None:
                return Selected(found, "store")
            known = self._known_scores(key)
            with open_slide() as slide:
                if known is not None and len(known.scores) != slide.num_patches:
                    known = None
                if known is not None:
                    query = None if question is None else question.query
                    selection = self.selector.select_by_scores(slide, known, k, key.scored_on, query)
                else:
                    selection, read = self._read(slide, k, question)
            # Only now is it sure that the slide did not change meanwhile.
            key = key._replace(scored_on=selection.scored_on)
            if known is None:
                self._save_scores(key, read)
            if self.store is not None:
                self.store.save_selection(key.of_selection(k, _digest(question)), selection)
        if not keep_all_scores:
            selection = selection.without_all_scores()
        return Selected(selection, "file" if known is None else "stored scores")

    def stored(
        self, key: SelectionKey, k: int, count_miss: bool = True, question: Question | None = None
    ) -> Selection | None:
        """The k best, where the store has them; the slide is not needed."""
        if self.store is None:
            return None
        found = self.store.load_selection(key.of_selection(k, _digest(question)), count_miss)
        if found is not None and (found.features.shape[1] != self.selector.feature_dim or found.num_tokens > k):
            return None
        return found

    @contextmanager
    def _alone(self, key: SelectionKey, waiting: Callable[[], None]) -> Iterator[None]:
        """Keeps out who would read the same slide: threads for other questions, and other processes."""
        digest, hears = key.of_scores(), isinstance(self.selector.scorer, QuestionScorer)
        if hears and self._vectors.get(digest) is not None:  # the slide was read already
            yield
            return
        with ExitStack() as locks:
            if hears:
                locks.enter_context(self._vectors.alone(digest, waiting))
            if self.store is not None:
                locks.enter_context(self.store.alone(digest, waiting))
            yield

    def _known_scores(self, key: SelectionKey) -> SlideScores | None:
        digest, hears = key.of_scores(), isinstance(self.selector.scorer, QuestionScorer)
        found = self._vectors.get(digest) if hears else None
        if found is None and self.store is not None:
            found = self.store.load_scores(digest)
            if found is not None and not self._fits(found):
                return None
            if found is not None and hears:
                self._vectors.put(digest, found)
        return found

    def _fits(self, known: SlideScores) -> bool:
        """Whether they are what this selector makes of a slide."""
        scorer, selector = self.selector.scorer, self.selector
        shape = (scorer.rank,) if isinstance(scorer, QuestionScorer) else ()
        pools = None if known.pools is None else tuple(known.pools.sums.shape)
        wanted = (selector.summary_tokens, selector.feature_dim) if selector.summary_tokens else None
        return tuple(known.scores.shape[1:]) == shape and pools == wanted

    def _read(self, slide: FeatureFile, k: int, question: Question | None) -> tuple[Selection, SlideScores]:
        """The selection with all scores, and what of it serves every K and question."""
        if not isinstance(self.selector.scorer, QuestionScorer):
            selection = self.selector.select(slide, k, keep_all_scores=True)
            assert selection.all_scores is not None
            return selection, SlideScores(selection.all_scores, selection.pools)
        found = self.selector.read_vectors(slide)
        query = None if question is None else question.query
        return self.selector.select_of_vectors(slide, found, k, query), found.known

    def _save_scores(self, key: SelectionKey, known: SlideScores) -> None:
        if isinstance(self.selector.scorer, QuestionScorer):
            self._vectors.put(key.of_scores(), known)
        if self.store is not None:
            self.store.save_scores(key.of_scores(), known)


def _digest(question: Question | None) -> str | None:
    return None if question is None else question.digest


def scorer_name(digest: str, selector: SlideSelector) -> str:
    """Of a scorer by the digest of its weights, and of the rules by which slides are refused and dropped patches
    pooled."""
    rules = f"{selector.encoder}, at most {selector.max_patches} patches"
    return f"{digest}:{rules}, {selector.summary_tokens} summary tokens"


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
