"""The scorer of a checkpoint on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from vllm_wsi.errors import CheckpointError, WsiError
from vllm_wsi.selection.calibration import Calibration
from vllm_wsi.selection.scorer import FrozenScorer, Scorer, build_scorer, frozen_scorer, scorer_digest
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides.encoder_names import Mismatch

from .config import SparseWSIConfig
from .weight_files import weight_files

SCORER_PREFIX = "scorer."
CALIBRATION = "calibration.json"


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Around what transformers and safetensors read of a checkpoint, a decoder or a tokenizer.

    Args:
        model: directory or hub name, for the error.

    Raises:
        CheckpointError: it is not there, or its files are damaged or of another kind.
    """
    try:
        yield
    except WsiError as error:
        raise CheckpointError(f"{model}: {error}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{model}: found no checkpoint that loads ({reason}), wanted one") from error


def read_config(model: str, revision: str | None = None) -> SparseWSIConfig:
    """The configuration of a checkpoint directory or hub repository.

    Raises:
        CheckpointError: there is none, or it is no slide model's.
    """
    with loading(model):
        return SparseWSIConfig.from_pretrained(model, revision=revision)


def load_scorer(model: str, revision: str | None = None) -> FrozenScorer:
    """The scorer of a checkpoint, as serving runs it; of the rest nothing is read. Errors as of `trained_scorer`."""
    return frozen_scorer(trained_scorer(model, revision))


def trained_scorer(model: str, revision: str | None = None) -> Scorer:
    """Reads the scorer, and nothing else, from a checkpoint directory or a hub repository.

    Raises:
        CheckpointError: the checkpoint has no scorer, or one that its config does not describe.
    """
    config = read_config(model, revision)
    with loading(model):
        files = weight_files(model, revision, lambda name: name.startswith(SCORER_PREFIX))
    state: dict[str, Tensor] = {}
    for file in files:
        with loading(model), safe_open(file, "pt") as tensors:
            keys = [key for key in tensors.keys() if key.startswith(SCORER_PREFIX)]  # noqa: SIM118
            state |= {key.removeprefix(SCORER_PREFIX): tensors.get_tensor(key) for key in keys}
    with loading(model):
        scorer = build_scorer(**config.scorer_options)
    try:
        scorer.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{model}: {SCORER_PREFIX}*: found other weights than config.json describes: {reason}"
        ) from error
    return scorer


def load_calibration(model: str, scorer: FrozenScorer, revision: str | None = None) -> Calibration | None:
    """What was fitted to a checkpoint on validation; None where nothing was.

    Raises:
        CheckpointError: it is damaged, or was fitted to another scorer.
    """
    with loading(model):
        path = cached_file(model, CALIBRATION, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is None:
            return None
        found = Calibration.of(json.loads(Path(path).read_text("utf-8")), CALIBRATION)
    if found.scorer != (wanted := scorer_digest(scorer)):
        raise CheckpointError(
            f"{model}: {CALIBRATION}: scorer: found {found.scorer}, wanted {wanted}; run vllm-wsi calibrate again"
        )
    return found


def load_selector(
    model: str, device: str = "cpu", revision: str | None = None, encoder_mismatch: Mismatch = "refuse"
) -> SlideSelector:
    """The selector of a checkpoint directory or hub repository, as serving builds it."""
    config = read_config(model, revision)
    encoder = config.encoder_check(encoder_mismatch)
    scorer = load_scorer(model, revision)
    return SlideSelector(
        scorer,
        config.num_slide_tokens,
        device,
        config.max_patches,
        encoder=encoder,
        summary_tokens=config.summary_tokens,
    )
