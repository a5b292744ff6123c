"""What a server is told about slides at its start: `--mm-processor-kwargs`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from vllm_wsi.settings import Settings
from vllm_wsi.slides.encoder_names import Mismatch


class ServerOptions(Settings, frozen=True):
    """The keys of `--mm-processor-kwargs`, one JSON object."""

    num_slide_tokens: int | None = Field(None, ge=1)
    """K, tokens of each slide; none: the checkpoint's. One request chooses another one by `#k=` in the
    slide's URL."""
    selection_device: str | None = None
    """Where slides are scored: `auto`, `cpu`, `cuda` or `cuda:N`; none: `device`, else `auto`. vLLM takes `device` only
    on a CPU or on an instance that runs no language model, because a processor's memory is not in its budget. A
    selection's is small and bounded."""
    device: str | None = None
    """vLLM's own key of that meaning, where `selection_device` is not given."""
    encoder_mismatch: Mismatch = "refuse"
    """What becomes of features of another encoder, or of patches of another size, than the checkpoint's."""
    selection_store: str | Path | None = None
    """Folder in which finished selections and scores are kept; none: the environment variable `VLLM_WSI_STORE`, else
    no store."""
    selection_store_gib: float | None = Field(None, gt=0)
    """Bound of that folder's size; none: 10."""
