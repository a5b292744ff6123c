"""`vllm-wsi eval`."""

from __future__ import annotations

import asyncio
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vllm_wsi.errors import SettingsError, SetupError, needs_extra

from .options import Mismatch, Ray, chosen_executor, option

if TYPE_CHECKING:
    from vllm_wsi.benchmark.runner import Evaluation

TASK_HELP = "slidebench-tcga, slidebench-bcnb, wsi-vqa, wsi-bench, multipathqa, or csv"
BASELINES = "blind,constant,random-32,uniform-32"
COLUMNS_HELP = "of --task csv: slide, question, answer, A .. H, key, category"
MODE_HELP = "written answers, probabilities of the options' letters, or both (default generate)"
WORK_HELP = "for the slides of 32 patches (default: a hidden folder in --features)"
ALLOW_HELP = "for --offline: features of another encoder than the checkpoint's (default refuse)"
ENDPOINT_HELP = "OpenAI-compatible, with /v1; the key is in OPENAI_API_KEY"


# Many parameters, and so many lines: a command has one for each of its options.
def evaluate(
    task: Annotated[str, option("--task", help=TASK_HELP)],
    data: Annotated[Path, option("--data", metavar="FILE", help="the benchmark's question file")],
    features: Annotated[Path, option("--features", metavar="DIR", help="feature files of its slides")],
    out: Annotated[Path, option("--out", metavar="DIR", help="a run that was stopped there goes on")],
    endpoint: Annotated[str | None, option("--endpoint", metavar="URL", help=ENDPOINT_HELP)] = None,
    offline: Annotated[
        str | None, option("--offline", metavar="CHECKPOINT", help="vLLM in this process instead")
    ] = None,
    export_batch: Annotated[
        Path | None, option("--export-batch", metavar="FILE", help="write the requests as an OpenAI batch file")
    ] = None,
    import_batch: Annotated[
        Path | None, option("--import-batch", metavar="FILE", help="score a batch's output")
    ] = None,
    model: Annotated[
        str | None, option("--model", help="as the server names it (default: its first); needed for batches")
    ] = None,
    mode: Annotated[Literal["generate", "choice", "both"], option("--mode", help=MODE_HELP)] = "generate",
    baselines: Annotated[
        str, option("--baselines", metavar="NAME,...", help=f"asked beside it, or none (default {BASELINES})")
    ] = BASELINES,
    skip_slides: Annotated[
        Path | None, option("--skip-slides", metavar="FILE", help="slides to leave out, one a line")
    ] = None,
    limit: Annotated[int | None, option("--limit", metavar="N", help="the first N questions alone")] = None,
    columns: Annotated[str, option("--columns", metavar="NAME=COLUMN,...", help=COLUMNS_HELP)] = "",
    features_url: Annotated[
        str | None, option("--features-url", metavar="URL", help="DIR as the server sees it (default: its file:// URL)")
    ] = None,
    work: Annotated[Path | None, option("--work", metavar="DIR", help=WORK_HELP)] = None,
    compare: Annotated[
        list[Path] | None, option("--compare", metavar="DIR", help="--out of an earlier run; may be given again")
    ] = None,
    concurrency: Annotated[int, option("--concurrency", metavar="N", help="requests at once (default 8)")] = 8,
    retries: Annotated[int, option("--retries", metavar="N", min=0, help="of a request (default 5)")] = 5,
    timeout: Annotated[float, option("--timeout", metavar="S", help="of an attempt (default 600)")] = 600,
    max_tokens: Annotated[int, option("--max-tokens", metavar="N", help="of an answer (default 500)")] = 500,
    engine_args: Annotated[str, option("--engine-args", metavar="JSON", help="of vllm.LLM, for --offline")] = "{}",
    encoder_mismatch: Annotated[Mismatch, option("--encoder-mismatch", help=ALLOW_HELP)] = "refuse",
    seed: Annotated[int, option("--seed", help="of random-32 and of the intervals")] = 0,
    ray: Ray = None,
    workers: Annotated[
        int | None, option("--workers", metavar="N", min=1, help="engines at once, for --ray (default: by GPUs)")
    ] = None,
) -> None:
    """Without a way to ask, what was answered so far is summed up."""
    ways = {
        "--endpoint": endpoint,
        "--offline": offline,
        "--export-batch": export_batch,
        "--import-batch": import_batch,
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"found {' and '.join(given)}, wanted one of them")
    if ray is not None and offline is None:
        raise typer.BadParameter("found --ray, wanted --offline with it")
    if workers is not None and ray is None:
        raise typer.BadParameter("found --workers, wanted --ray with it")
    arguments = _json_object(engine_args)
    with needs_extra("eval"):
        from vllm_wsi.benchmark.report import report
        from vllm_wsi.benchmark.runner import EvalSettings, Evaluation

    settings = EvalSettings(
        task=task,
        data=data,
        features=features,
        out=out,
        modes=("generate", "choice") if mode == "both" else (mode,),
        baselines=tuple(name for name in baselines.split(",") if name and name != "none"),
        columns=_columns(columns),
        skip_slides=_lines(skip_slides),
        limit=limit,
        features_url=features_url,
        work=work,
        max_tokens=max_tokens,
        seed=seed,
        concurrency=concurrency,
    )
    evaluation = Evaluation(settings)
    if export_batch is not None:
        _export(evaluation, export_batch, model)
        return
    if import_batch is not None:
        _import(evaluation, import_batch, model)
    elif offline is not None:
        _ask_offline(evaluation, offline, arguments, encoder_mismatch, ray, workers)
    elif endpoint is not None:
        asyncio.run(_ask_endpoint(evaluation, endpoint, model, retries, timeout))
    lines, num_errors = report(evaluation, compare or ())
    for line in lines:
        print(line)
    if num_errors:
        raise typer.Exit(1)


async def _ask_endpoint(evaluation: Evaluation, url: str, model: str | None, retries: int, timeout: float) -> None:
    from vllm_wsi.benchmark.ask_endpoint import Endpoint, ask_endpoint

    endpoint = Endpoint(url, model, retries, timeout)
    try:
        await ask_endpoint(evaluation, endpoint)
    finally:
        await endpoint.close()


def _ask_offline(
    evaluation: Evaluation,
    checkpoint: str,
    engine_args: dict[str, Any],
    encoder_mismatch: Mismatch,
    ray: str | None,
    workers: int | None,
) -> None:
    from vllm_wsi.benchmark.ask_offline import ask_offline

    if find_spec("vllm") is None:
        raise SetupError('--offline: found no vLLM, wanted it: pip install "vllm-wsi[gpu]" or "vllm-wsi[cpu]"')
    if encoder_mismatch == "allow":
        options = {**engine_args.get("mm_processor_kwargs", {}), "encoder_mismatch": encoder_mismatch}
        engine_args = {**engine_args, "mm_processor_kwargs": options}
    if ray is None:
        ask_offline(evaluation, checkpoint, engine_args)
        return
    with chosen_executor(ray, workers) as executor:
        ask_offline(evaluation, checkpoint, engine_args, executor)


def _export(evaluation: Evaluation, path: Path, model: str | None) -> None:
    from vllm_wsi.benchmark.ask_batch import export_batch

    if model is None:
        raise SettingsError("--model: found none, wanted the name under which the batch's engine serves the checkpoint")
    requests, missing = export_batch(evaluation, path, model)
    print(f"{path}: {requests} requests")
    if missing:
        print(f"{len(missing)} slides have no usable features: {', '.join(missing[:10])}")


def _import(evaluation: Evaluation, path: Path, model: str | None) -> None:
    from vllm_wsi.benchmark.ask_batch import import_batch

    if model is None:
        raise SettingsError("--model: found none, wanted the name that --export-batch was given")
    import_batch(evaluation, path, model)


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"found no JSON ({error}), wanted an object", param_hint="--engine-args") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"found {text}, wanted a JSON object", param_hint="--engine-args")
    return found


def _columns(text: str) -> dict[str, str]:
    columns = {}
    for part in filter(None, text.split(",")):
        name, equals, column = part.partition("=")
        if not (name and equals and column):
            raise SettingsError(f"--columns: found {part!r}, wanted NAME=COLUMN")
        columns[name] = column
    return columns


def _lines(path: Path | None) -> frozenset[str]:
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n") if path is not None else []
    return frozenset(line.strip() for line in lines if line.strip())
