"""What a slide is read for once, and what each question then costs: vectors of all patches, and the best of them."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_wsi.kernels import gpu_vectors, map_blocks, select_topk

from .chunk_reader import ChunkReader
from .question_scorer import QuestionScorer
from .scoring_device import Place, launching
from .slide_pools import SlideScores, filled_pools, open_pools


class SlideVectors(NamedTuple):
    """What a slide is read for, whatever is asked."""

    known: SlideScores  # with the patches' vectors, of `slide_vectors`
    scored_on: str
    read_seconds: float
    score_seconds: float
    fallback: str | None = None  # why the CPU did what a GPU should have


BLOCK_ROWS = 4096


class Question(NamedTuple):
    """What is asked of a slide."""

    text: str
    query: Tensor  # fp32 [R], what the scorer made of it

    @property
    def digest(self) -> str:
        """Of the query's bits. The patches depend on these alone, and they on tokenizer and token embeddings too."""
        return hashlib.blake2b(self.query.numpy().tobytes(), digest_size=16).hexdigest()


def slide_vectors(reader: ChunkReader, scorer: QuestionScorer, place: Place, summary_tokens: int = 0) -> SlideScores:
    """phi of all patches, [N, R] in the dtype in which it is kept (`vector_dtype`), and their pools; on the CPU."""

    def fill(start: int, chunk: Tensor) -> None:
        x = chunk.to(place.device, non_blocking=True)
        with launching(place):
            out = gpu_vectors(x, weights)
        if out is None:
            out = torch.empty(len(chunk), scorer.rank, device=place.device)
            map_blocks(x, start, scorer.vectors, out, scorer.block_rows)
        if pools is not None:
            pools.add_chunk(start, x)
        vectors[start : start + len(chunk)] = out.cpu()

    vectors, weights = torch.empty(reader.num_patches, scorer.rank, dtype=scorer.vector_dtype), scorer.vector_weights()
    pools = open_pools(summary_tokens, scorer.feature_dim, place.device)
    done: Future[None] | None = None
    for start, chunk in reader.chunks():  # one chunk is worked on while the next is read
        if done is not None:
            done.result()
        done = place.run(fill, start, chunk)
    assert done is not None
    done.result()
    return SlideScores(vectors, filled_pools(pools))


class BestByQuestion(NamedTuple):
    """The kept patches of a slide, and the scores of all."""

    rows: Tensor  # int64 [m], ascending, m = min(k, patches with a finite score)
    scores: Tensor  # fp32 [N], by the query
    free: Tensor  # fp32 [N], by the query that asks nothing


def best_by_question(scorer: QuestionScorer, vectors: Tensor, k: int, query: Tensor | None) -> BestByQuestion:
    """Keeps the best k patches of a slide for a question.

    The best by the query come first; the last `free_of(k)` places go to the best of the others by the query that asks
    nothing. That one chooses all where there is no question.

    Args:
        vectors: [N, R], of `slide_vectors`.
        query: fp32 [R], or None.
    """
    free_query = scorer.free_query.detach().cpu()
    scores, free = _scores(vectors, free_query if query is None else query, free_query)
    if query is None:
        return BestByQuestion(_best(free, k), free, free)
    num_free = scorer.free_of(k)
    rows = _best(scores, k - num_free)
    if num_free:
        rows = torch.cat((rows, _best(free.index_fill(0, rows, -torch.inf), num_free))).sort().values
    return BestByQuestion(rows, scores, free)


def _scores(vectors: Tensor, *queries: Tensor) -> tuple[Tensor, ...]:
    """fp32 [N] by each query. In blocks that stay in a core's cache, whose bits do not depend on the cores."""
    both = torch.stack(queries)
    out = torch.empty(len(vectors), len(queries))
    map_blocks(vectors, 0, lambda block: F.linear(block.float(), both), out, BLOCK_ROWS)
    return tuple(column.contiguous() for column in out.unbind(dim=1))


def _best(scores: Tensor, k: int) -> Tensor:
    if k < 1:
        return torch.empty(0, dtype=torch.int64)
    rows = select_topk(scores, k).indices[0]
    return rows[rows >= 0]
