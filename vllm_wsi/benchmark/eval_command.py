"""`vllm-wsi eval`: which of the ways to ask, then the summary."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_wsi.slides.encoder_names import Mismatch

from .ask_batch import export_batch, import_batch
from .ask_endpoint import Endpoint, ask_endpoint
from .report import report
from .runner import EvalSettings, Evaluation


def run_eval_command(
    task: str,
    data: Path,
    features: Path,
    out: Path,
    endpoint: str | None,
    offline: str | None,
    export_batch: Path | None,
    import_batch: Path | None,
    model: str | None,
    mode: str,
    baselines: str,
    skip_slides: Path | None,
    limit: int | None,
    columns: str,
    features_url: str | None,
    work: Path | None,
    compare: Sequence[Path],
    concurrency: int,
    retries: int,
    timeout: float,
    max_tokens: int,
    engine_args: Mapping[str, Any],
    encoder_mismatch: Mismatch,
    seed: int,
) -> int:
    """The arguments are the command's options; without a way to ask, what was answered so far is summed up.

    Returns:
        0, or 1 where questions went unanswered.
    """
    skipped = skip_slides.read_text(encoding="utf-8-sig").split("\n") if skip_slides else []
    settings = EvalSettings(
        task,
        data,
        features,
        out,
        modes=("generate", "choice") if mode == "both" else ("choice",) if mode == "choice" else ("generate",),
        baselines=tuple(name for name in baselines.split(",") if name and name != "none"),
        columns=_columns(columns),
        skip_slides=frozenset(line.strip() for line in skipped if line.strip()),
        limit=limit,
        features_url=features_url,
        work=work,
        max_tokens=max_tokens,
        seed=seed,
        concurrency=concurrency,
    )
    evaluation = Evaluation(settings)
    if export_batch is not None:
        return _export(evaluation, export_batch, model)
    if import_batch is not None:
        _import(evaluation, import_batch, model)
    elif offline is not None:
        from .ask_offline import ask_offline

        ask_offline(evaluation, offline, _with_mismatch(engine_args, encoder_mismatch))
    elif endpoint is not None:
        asyncio.run(_ask(evaluation, endpoint, model, retries, timeout))
    lines, num_errors = report(evaluation, compare)
    for line in lines:
        print(line)
    return 1 if num_errors else 0


async def _ask(evaluation: Evaluation, url: str, model: str | None, retries: int, timeout: float) -> None:
    endpoint = Endpoint(url, model, retries, timeout)
    try:
        await ask_endpoint(evaluation, endpoint)
    finally:
        await endpoint.close()


def _export(evaluation: Evaluation, path: Path, model: str | None) -> int:
    if model is None:
        raise ValueError("--model: found none, wanted the name under which the batch's engine serves the checkpoint")
    requests, missing = export_batch(evaluation, path, model)
    print(f"{path}: {requests} requests")
    if missing:
        print(f"{len(missing)} slides have no usable features: {', '.join(missing[:10])}")
    return 0


def _import(evaluation: Evaluation, path: Path, model: str | None) -> None:
    if model is None:
        raise ValueError("--model: found none, wanted the name that --export-batch was given")
    import_batch(evaluation, path, model)


def _with_mismatch(engine_args: Mapping[str, Any], encoder_mismatch: Mismatch) -> Mapping[str, Any]:
    if encoder_mismatch == "refuse":
        return engine_args
    options = {**engine_args.get("mm_processor_kwargs", {}), "encoder_mismatch": encoder_mismatch}
    return {**engine_args, "mm_processor_kwargs": options}


def _columns(text: str) -> dict[str, str]:
    columns = {}
    for part in filter(None, text.split(",")):
        name, equals, column = part.partition("=")
        if not (name and equals and column):
            raise ValueError(f"--columns: found {part!r}, wanted NAME=COLUMN")
        columns[name] = column
    return columns
