"""Trained parts and the decoder that they belong to, put together to an ordinary checkpoint."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from vllm_wsi.errors import CheckpointError
from vllm_wsi.files import new_folder, refuse_content
from vllm_wsi.parts.fetch import cache_folder, file_sha256, locked
from vllm_wsi.parts.smollm2 import resolve_decoder

from .checkpoint import CALIBRATION, SCORER_PREFIX, loading
from .lora import merge_lora, write_lora
from .modeling import SparseWSIForConditionalGeneration
from .slide_token import add_slide_token
from .trained_parts import CARD, PROJECTOR_PREFIX, TrainedParts, over_decoder, read_trained_parts
from .weight_files import weights_sha256

ADAPTER_FOLDER = "adapter"
FORM = 1  # counts changes of what is written below: an older checkpoint in the cache is not used


# Many parameters: the options of `vllm-wsi assemble`.
def assemble(
    parts: str | Path,
    out: str | Path,
    decoder: str | None = None,
    revision: str | None = None,
    merge: bool = True,
    decoder_mismatch: Literal["refuse", "allow"] = "refuse",
) -> Path:
    """Writes a checkpoint that `vllm serve` and transformers take, whole or not at all.

    The same input gives the same bytes.

    Args:
        parts: directory of trained parts (`trained_parts.py`).
        out: a directory that does not exist yet, or is empty.
        decoder: directory or hub name of the decoder. None: the one that the parts name, which is fetched.
        revision: of `decoder` on the hub.
        merge: whether LoRA becomes part of the decoder's weights. Else it is left in `adapter/`, for
            `vllm serve --enable-lora --lora-modules NAME=OUT/adapter`; without it the decoder answers as it was.
        decoder_mismatch: what a decoder of other weights than the parts' own gets.

    Returns:
        `out`.

    Raises:
        CheckpointError: parts and decoder do not fit.
        SettingsError: `out` has content.
        SetupError: the decoder cannot be fetched.
    """
    out = Path(out)
    refuse_content(out)
    found = read_trained_parts(Path(parts))
    if decoder is None:
        decoder, revision = found.base.name, found.base.revision
    name = resolve_decoder(decoder)
    with loading(name):
        sha256 = weights_sha256(name, revision)
    if sha256 != found.base.sha256 and decoder_mismatch == "refuse":
        raise CheckpointError(
            f"{decoder}: found weights of sha256 {sha256[:12]}, wanted {found.base.sha256[:12]} ({found.base.name}), "
            "over which the parts were trained; --decoder-mismatch allow takes it all the same"
        )
    model, tokenizer = _put_together(found, name, revision, Path(parts), merge)
    with new_folder(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # What was fitted to the answers of one decoder is not true of another's.
        for name in (CARD, CALIBRATION) if sha256 == found.base.sha256 else (CARD,):
            if (Path(parts) / name).is_file():
                shutil.copyfile(Path(parts) / name, partial / name)
        if found.lora and not merge:
            (partial / ADAPTER_FOLDER).mkdir()
            write_lora(partial / ADAPTER_FOLDER, found.lora, found.base.name)
    return out


def assembled_folder(parts: str | Path) -> Path:
    """The checkpoint of trained parts in the cache folder, assembled at the first call; processes wait for each other.

    Raises:
        CheckpointError, SetupError: as `assemble`.
    """
    parts = Path(parts)
    digest = hashlib.sha256(str(FORM).encode())
    for file in sorted(path for path in parts.glob("*") if path.is_file()):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    folder = cache_folder() / f"assembled-{digest.hexdigest()[:12]}"
    cache_folder().mkdir(parents=True, exist_ok=True)
    with locked(cache_folder()):
        return folder if folder.is_dir() else assemble(parts, folder)


def _put_together(
    found: TrainedParts, name: str, revision: str | None, parts: Path, merge: bool
) -> tuple[SparseWSIForConditionalGeneration, PreTrainedTokenizerBase]:
    with loading(name):
        decoder = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    slide_token_id = add_slide_token(decoder, tokenizer)
    tokenizer.chat_template = found.chat_template
    config = over_decoder(found.config, decoder.config)
    for key, one, wanted in (
        ("slide_token_id", slide_token_id, config.slide_token_id),
        ("hidden_size", decoder.config.hidden_size, found.config.text_config.hidden_size),
    ):
        if one != wanted:
            raise CheckpointError(f"{name}: {key}: found {one}, wanted {wanted}, as the parts have it")
    if merge:
        merge_lora(decoder, found.lora, str(parts))
    model = SparseWSIForConditionalGeneration(config, language_model=decoder)
    for prefix, module in ((SCORER_PREFIX, model.scorer), (PROJECTOR_PREFIX, model.projector)):
        state = {key.removeprefix(prefix): one for key, one in found.weights.items() if key.startswith(prefix)}
        with loading(str(parts)):
            module.load_state_dict(state)
        module.to(torch.float32)
    model.generation_config = found.generation_config
    return model, tokenizer
