"""What the kernel benchmarks time: our kernels and what people run today.

A provider is a callable without arguments. What a machine lacks (a package, an operator, a compiler) raises `Missing`
with the reason in one sentence, and the benchmarks leave that provider out. All of them get their weights in the dtype
and their scratch in the place they want before the clock runs.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_wsi.kernels import ScorerWeights, score_patches, score_topk
from vllm_wsi.kernels.keys import pack_keys, unpack_keys
from vllm_wsi.kernels.reference import select_topk
from vllm_wsi.selection.scorer import seeded_scorer

OURS = "ours"
TWO_LAUNCHES = "ours in two launches"
CEILINGS = ("copy", "gemm")

Provider = Callable[[], object]
Select = Callable[[Tensor], Tensor]  # fp32 scores [n] to the k best rows, in any order


class Missing(Exception):
    """A provider cannot run here; the message says why."""


class Problem(NamedTuple):
    """The features of one or several slides, and the scorer."""

    x: Tensor  # [N, d]
    weights: ScorerWeights
    k: int
    bounds: tuple[int, ...]  # where each slide begins, and the end of the last
    cu_seqlens: Tensor | None  # the bounds on the device; None: one slide

    @property
    def hidden_size(self) -> int:
        return self.weights.hidden_size


def make_problem(lengths: list[int], d: int, h: int, k: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random slides of these lengths, each of at least k patches, behind a seeded scorer."""
    bounds = (0, *itertools.accumulate(lengths))
    x = torch.randn(bounds[-1], d, device=device, dtype=dtype)
    weights = seeded_scorer("patch", d, h, seed=0).requires_grad_(False).weights().to(device)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device) if len(lengths) > 1 else None
    return Problem(x, weights, k, bounds, cu_seqlens)


def check(problem: Problem) -> None:
    """Refuses to time a wrong answer.

    Our kept rows must be exactly the best by our own scores, and by the plain fp32 scores none of them may lie below
    the k-th best by more than rounding can do.
    """
    found = score_topk(problem.x, problem.weights, problem.k, cu_seqlens=problem.cu_seqlens)
    exact = select_topk(found.all_scores, problem.k, cu_seqlens=problem.cu_seqlens)
    if not torch.equal(found.indices, exact.indices):
        raise SystemExit("score_topk: our kept rows are not the best by our own scores; not timing that")
    scores = score_patches(problem.x, problem.weights)
    for kept, (begin, end) in zip(found.indices, itertools.pairwise(problem.bounds), strict=True):
        slide = scores[begin:end]
        gap = float(slide.topk(problem.k).values[-1] - slide[kept].min())
        if not gap <= 2e-2 * float(scores.std()):
            raise SystemExit(f"score_topk: kept a patch {gap:.3g} below the k-th best; not timing that")


def tried(name: str, build: Callable[[], Provider]) -> Provider:
    """The provider that `build` gives, called once.

    Raises:
        Missing: it cannot run here. Whatever goes wrong in ours goes through as it is.
    """
    try:
        provider = build()
        provider()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Missing:
        raise
    except Exception as error:
        if name == OURS:
            raise
        lines = str(error).strip().splitlines()
        raise Missing(f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}") from error
    return provider


def eager(x: Tensor, weights: ScorerWeights, k: int) -> tuple[Tensor, Tensor]:
    """What a user writes, all in X's dtype: LayerNorm, Linear, GELU, Linear, topk, index_select."""
    y = F.layer_norm(x, (x.shape[1],), weights.norm_weight, weights.norm_bias, weights.norm_eps)
    if weights.hidden_weight is not None:
        y = F.gelu(F.linear(y, weights.hidden_weight, weights.hidden_bias))
    scores = y @ weights.out_weight + weights.out_bias
    kept = torch.topk(scores, k).indices.sort().values
    return kept, x.index_select(0, kept)


def _ours(problem: Problem) -> Provider:
    return partial(score_topk, problem.x, problem.weights, problem.k, cu_seqlens=problem.cu_seqlens)


def _two_launches(problem: Problem) -> Provider:
    """What one launch is worth."""
    if not problem.x.is_cuda:
        raise Missing("needs CUDA")
    from vllm_wsi.kernels.buffers import Workspace
    from vllm_wsi.kernels.select import select_triton

    scores, workspace = _scores(problem), Workspace(problem.x.device, len(problem.bounds) - 1)
    x, k, cu_seqlens = problem.x, problem.k, problem.cu_seqlens
    return lambda: select_triton(scores(), k, x, cu_seqlens, workspace=workspace)


def _copy(problem: Problem) -> Provider:
    return copy_of(problem.x)


def copy_of(x: Tensor) -> Provider:
    """A ceiling: moves as many bytes as X has, half of them read and half written."""
    half = x[: (x.shape[0] + 1) // 2]
    return partial(torch.empty_like(half).copy_, half)


def _gemm(problem: Problem) -> Provider:
    """The other ceiling: the product X @ W alone."""
    if problem.hidden_size == 0:
        raise Missing("the linear scorer has no product")
    return partial(torch.mm, problem.x, problem.x.new_ones(problem.x.shape[1], problem.hidden_size).normal_())


def _in_dtype(problem: Problem) -> ScorerWeights:
    named = problem.weights._asdict()
    return problem.weights._replace(**{n: p.to(problem.x.dtype) for n, p in named.items() if isinstance(p, Tensor)})


def _eager(problem: Problem) -> Provider:
    """One call for each slide."""
    weights = _in_dtype(problem)
    slides = [problem.x[begin:end] for begin, end in itertools.pairwise(problem.bounds)]
    return lambda: [eager(slide, weights, problem.k) for slide in slides]


def _compiled(problem: Problem) -> Provider:
    if not problem.x.is_cuda:
        raise Missing("not measured on the CPU")
    torch.compiler.reset()  # else the ninth shape would silently run eagerly
    compiled = torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs")
    return partial(compiled, problem.x, _in_dtype(problem), problem.k)


def _scores(problem: Problem) -> Callable[[], Tensor]:
    """Our scores; on the CPU those of the plain path."""
    if not problem.x.is_cuda:
        return partial(score_patches, problem.x, problem.weights)
    from vllm_wsi.kernels.score import score_triton

    return partial(score_triton, problem.x, problem.weights)


def _through(select_name: str, problem: Problem) -> Provider:
    """Our scores behind another selection, rows in the slide's order: what our selecting kernel is worth."""
    scores = _scores(problem)
    select = selector(select_name, scores(), problem.k)

    def provider() -> tuple[Tensor, Tensor]:
        kept = select(scores()).sort().values
        return kept, problem.x.index_select(0, kept)

    return provider


def selector(name: str, scores: Tensor, k: int) -> Select:
    """The selection of this name for vectors like `scores`, once it gave the right set of them.

    Raises:
        Missing: it cannot run here, or keeps a wrong set.
    """
    select = SELECTORS[name](scores.shape[0], k, scores.device)
    kept = select(scores).long()
    best = torch.topk(scores, k).values
    inside = kept.shape == (k,) and bool(((kept >= 0) & (kept < scores.shape[0])).all())
    if not (inside and len(kept.unique()) == k and torch.equal(scores[kept].sort(descending=True).values, best)):
        raise Missing("keeps a wrong set")
    return select


def _select_ours(n: int, k: int, device: torch.device) -> Select:
    """Ordered by score, as the others do."""
    if device.type != "cuda":
        return lambda scores: select_topk(scores, k, by_score=True).indices[0]
    from vllm_wsi.kernels.buffers import Workspace
    from vllm_wsi.kernels.select import select_triton

    workspace = Workspace(device)
    return lambda scores: select_triton(scores, k, by_score=True, workspace=workspace).indices[0]


def _torch_topk(n: int, k: int, device: torch.device) -> Select:
    return lambda scores: torch.topk(scores, k).indices


def _torch_topk_of_keys(n: int, k: int, device: torch.device) -> Select:
    """The same contract as ours: a tie goes to the lower row."""
    return lambda scores: unpack_keys(torch.topk(pack_keys(scores), k).values)[0]


def _flashinfer(options: dict[str, Any], n: int, k: int, device: torch.device) -> Select:
    if device.type != "cuda":
        raise Missing("needs CUDA")
    if importlib.util.find_spec("flashinfer") is None:
        raise Missing("flashinfer is not installed")
    import flashinfer

    if not hasattr(flashinfer, "top_k"):
        raise Missing(f"flashinfer {getattr(flashinfer, '__version__', '')} has no top_k")
    if absent := options.keys() - inspect.signature(flashinfer.top_k).parameters.keys():
        raise Missing(f"flashinfer.top_k of this version takes no {', '.join(sorted(absent))}")
    return lambda scores: flashinfer.top_k(scores[None], k, **options)[1][0]


def _vllm_per_row(n: int, k: int, device: torch.device) -> Select:
    """vLLM's only Top-K for any k. Its library is loaded alone: `import vllm` would change torch.compile's settings."""
    if device.type != "cuda":
        raise Missing("needs CUDA")
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise Missing("vllm is not installed")
    library = next(Path(spec.origin).parent.glob("_C_stable_libtorch*.so"), None)
    if library is None:
        raise Missing("this build of vllm has no CUDA operators")
    torch.ops.load_library(str(library))
    if not hasattr(torch.ops._C, "top_k_per_row_decode"):
        raise Missing("this version of vllm has no operator top_k_per_row_decode")
    lengths = torch.tensor([n], dtype=torch.int32, device=device)
    kept = torch.empty((1, k), dtype=torch.int32, device=device)

    def select(scores: Tensor) -> Tensor:
        # logits [1, n], next_n, seq_lens, indices, num_rows, stride0, stride1, top_k
        torch.ops._C.top_k_per_row_decode(scores[None], 1, lengths, kept, 1, n, 1, k)
        return kept[0]

    return select


SELECTORS: dict[str, Callable[[int, int, torch.device], Select]] = {
    OURS: _select_ours,
    "torch.topk": _torch_topk,
    "torch.topk of keys": _torch_topk_of_keys,
    "FlashInfer": partial(_flashinfer, {}),
    # tie_break 1 is TopKTieBreak.SMALL: the lower index.
    "FlashInfer exact": partial(_flashinfer, {"sorted": True, "deterministic": True, "tie_break": 1}),
    "vLLM top_k_per_row": _vllm_per_row,
}

PROVIDERS: dict[str, Callable[[Problem], Provider]] = {
    "copy": _copy,
    "gemm": _gemm,
    OURS: _ours,
    TWO_LAUNCHES: _two_launches,
    "eager torch": _eager,
    "torch.compile": _compiled,
    **{f"our scores + {name}": partial(_through, name) for name in SELECTORS if name != OURS},
}
RAGGED = ("copy", "gemm", OURS, TWO_LAUNCHES, "eager torch")
