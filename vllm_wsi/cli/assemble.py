"""`vllm-wsi assemble`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .options import Mismatch, argument, hide_transformers_progress, option

DECODER_HELP = "directory or hub name (default: the one that the parts name, fetched into the cache folder)"
NO_MERGE_HELP = "leave the LoRA adapter apart, in DIR/adapter, for --lora-modules (default: merged into the decoder)"


def assemble(
    parts: Annotated[Path, argument(metavar="PARTS", help="directory of trained parts: `trained/` of a training run")],
    out: Annotated[Path, option("--out", metavar="DIR", help="a new directory")],
    decoder: Annotated[str | None, option("--decoder", help=DECODER_HELP)] = None,
    revision: Annotated[str | None, option("--revision", help="of --decoder on the hub")] = None,
    no_merge: Annotated[bool, option("--no-merge", help=NO_MERGE_HELP)] = False,
    decoder_mismatch: Annotated[
        Mismatch, option("--decoder-mismatch", help="a decoder of other weights than the parts' (default refuse)")
    ] = "refuse",
) -> None:
    hide_transformers_progress()
    from vllm_wsi.model import assemble as assembling
    from vllm_wsi.model.lora import served_rank

    assembling.assemble(parts, out, decoder, revision, not no_merge, decoder_mismatch)
    serve = f"vllm serve {out} --plugin vllm_wsi --allowed-local-media-path DIR"
    adapter = out / assembling.ADAPTER_FOLDER
    if adapter.is_dir():
        serve += f" --enable-lora --max-lora-rank {served_rank(adapter)} --lora-modules trained={adapter}"
    print(f"{out}: serve it with\n  {serve}")
