"""`vllm-wsi init-checkpoint`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from vllm_wsi.errors import CheckpointError

from .options import argument, hide_transformers_progress, option

SHAPE_HELP = (
    "config.json of a decoder of any size, instead of a small one; written without the decoder's weights, for "
    "`vllm serve --load-format dummy`: to measure what that size costs"
)


# Many parameters: a command has one for each of its options.
def init_checkpoint(
    out: Annotated[Path, argument(metavar="DIR")],
    feature_dim: Annotated[int, option("--feature-dim", metavar="D", help="size of a patch feature")],
    decoder: Annotated[Literal["qwen2", "qwen3", "llama"], option("--decoder")] = "qwen2",
    hidden_size: Annotated[int, option("--hidden-size", help="of the decoder (default 128)")] = 128,
    layers: Annotated[int, option("--layers", help="of the decoder (default 2)")] = 2,
    max_positions: Annotated[int, option("--max-positions", help="of the decoder (default 8192)")] = 8192,
    scorer: Annotated[Literal["patch", "context", "question"], option("--scorer", help="(default patch)")] = "patch",
    scorer_hidden_size: Annotated[
        int, option("--scorer-hidden-size", metavar="H", help="0: the plain linear scorer")
    ] = 256,
    num_slide_tokens: Annotated[int, option("--num-slide-tokens", metavar="K")] = 32,
    summary_tokens: Annotated[
        int, option("--summary-tokens", metavar="S", help="of K, means of the dropped patches")
    ] = 0,
    position_ids: Annotated[Literal["original", "packed"], option("--position-ids")] = "original",
    seed: Annotated[int, option("--seed")] = 0,
    text_config: Annotated[Path | None, option("--text-config", metavar="FILE", help=SHAPE_HELP)] = None,
) -> None:
    hide_transformers_progress()
    from vllm_wsi.model import init_checkpoint as write
    from vllm_wsi.model.tiny_settings import TinySettings

    settings = TinySettings(
        feature_dim=feature_dim,
        scorer_kind=scorer,
        scorer_hidden_size=scorer_hidden_size,
        num_slide_tokens=num_slide_tokens,
        summary_tokens=summary_tokens,
        position_ids=position_ids,
        seed=seed,
        decoder=decoder,
        hidden_size=hidden_size,
        num_layers=layers,
        max_position_embeddings=max_positions,
    )
    serve = f"vllm serve {out} --plugin vllm_wsi --allowed-local-media-path DIR"
    if text_config is not None:
        write.init_shape(out, settings, _read_json(text_config))
        print(f"{out}: a shape without the decoder's weights. Serve it with\n  {serve} --load-format dummy")
    else:
        write.init_checkpoint(out, settings)
        print(f"{out}: random weights from seed {seed}; its answers mean nothing. Serve it with\n  {serve}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: found no JSON ({error}), wanted a decoder's config.json") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: found a {type(found).__name__}, wanted a decoder's config.json")
    return found
