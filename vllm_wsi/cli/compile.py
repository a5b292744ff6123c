"""`vllm-wsi compile`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from vllm_wsi.errors import SettingsError, needs_extra

from .options import option


def compile_kernels(
    checkpoint: Annotated[str, option("--checkpoint", metavar="C", help="directory or hub name")],
    arch: Annotated[str, option("--arch", metavar="sm_NN", help="of the GPU that will serve: sm_80, sm_90, ...")],
) -> None:
    with needs_extra("gpu"):
        import triton

        from vllm_wsi.kernels.compile_ahead import compile_ahead, compile_vectors_ahead
    from vllm_wsi.kernels import ScorerWeights
    from vllm_wsi.kernels.reference import MAX_FAST_K
    from vllm_wsi.model.checkpoint import load_scorer, read_config
    from vllm_wsi.selection.question_scorer import QuestionScorer

    digits = arch.removeprefix("sm_")
    if not (digits.isascii() and digits.isdigit() and 80 <= int(digits) <= 130):
        raise SettingsError(f"--arch: found {arch!r}, wanted sm_80 .. sm_130")
    scorer, k = load_scorer(checkpoint), read_config(checkpoint).num_kept_patches
    if not isinstance(scorer, ScorerWeights | QuestionScorer):
        raise SettingsError(
            f"{checkpoint}: found a scorer over the whole slide, which PyTorch runs: nothing to compile"
        )
    began = time.monotonic()
    if isinstance(scorer, QuestionScorer):
        count = compile_vectors_ahead(scorer.vector_weights(), int(digits))
    else:
        count = compile_ahead(scorer, [one for one in (k, MAX_FAST_K) if one <= MAX_FAST_K], int(digits))
    folder = triton.knobs.cache.dir
    typer.echo(
        f"{count} kernels for {arch} in {folder}, by Triton {triton.__version__}: {time.monotonic() - began:.0f} s"
    )
