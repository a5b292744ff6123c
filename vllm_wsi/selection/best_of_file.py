"""Which patches `SlideSelector` keeps of an open feature file, and what it learns of all of them on the way."""

from __future__ import annotations

from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_wsi.kernels import ScoredTopK, ScorerWeights, block_rows, map_blocks, score_topk, select_topk
from vllm_wsi.slides import FeatureFile

from .chunk_reader import ChunkReader, read_tensor_rows
from .scorer import ContextScorer
from .scoring_device import Place, launching
from .slide_pools import SlideScores, filled_pools, open_pools


class Kept(NamedTuple):
    """On the CPU, without the places that no patch took."""

    indices: Tensor
    scores: Tensor
    features: Tensor


def best_in_stream(
    reader: ChunkReader, weights: ScorerWeights, k: int, place: Place, summary_tokens: int
) -> tuple[Kept, SlideScores]:
    """The best k, chunk by chunk with a running Top-K."""

    def score_chunk(start: int, chunk: Tensor, running: ScoredTopK | None) -> ScoredTopK:
        x = chunk.to(place.device, non_blocking=True)
        with launching(place):
            found = score_topk(x, weights, k, first_row=start, running=running)
        if pools is not None:
            pools.add_chunk(start, x)
        scores[start : start + len(chunk)] = found.all_scores.cpu()
        return found

    scores, pools = torch.empty(reader.num_patches), open_pools(summary_tokens, weights.feature_dim, place.device)
    running: Future[ScoredTopK] | None = None
    for start, chunk in reader.chunks():
        # One chunk is scored while the next is read; its buffer is free when the one after that is asked for.
        running = place.run(score_chunk, start, chunk, None if running is None else running.result())
    assert running is not None
    best = running.result()
    present = best.indices[0].cpu() >= 0
    kept = Kept(*(x[0].cpu()[present] for x in (best.indices, best.scores, best.rows)))
    return kept, SlideScores(scores, filled_pools(pools))


def best_in_context(
    reader: ChunkReader, scorer: ContextScorer, k: int, place: Place, summary_tokens: int
) -> tuple[Kept, SlideScores]:
    """The best k by tokens of all patches, then the blocks, then Top-K; the kept rows are read once more."""

    def embed_chunk(start: int, chunk: Tensor) -> None:
        out = tokens[start : start + len(chunk)]
        x = chunk.to(place.device, non_blocking=True)
        map_blocks(x, start, scorer.embed, out, rows)
        if pools is not None:
            pools.add_chunk(start, x)

    tokens = torch.empty(reader.num_patches, scorer.hidden_size, device=place.device)
    pools = open_pools(summary_tokens, scorer.feature_dim, place.device)
    rows = block_rows(max(scorer.feature_dim, scorer.hidden_size))
    done: Future[None] | None = None
    for start, chunk in reader.chunks():
        if done is not None:
            done.result()
        done = place.run(embed_chunk, start, chunk)
    assert done is not None
    done.result()
    scores = place.run(scorer.score_tokens, tokens).result().cpu()
    return best_by_scores(reader.slide, scores, k), SlideScores(scores, filled_pools(pools))


def best_by_scores(slide: FeatureFile, scores: Tensor, k: int) -> Kept:
    """The best k by the scores of all patches; their rows are read."""
    selected = select_topk(scores, k)
    present = selected.indices[0] >= 0
    indices = selected.indices[0][present]
    return Kept(indices, selected.scores[0][present], read_tensor_rows(slide, indices))
