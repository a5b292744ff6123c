"""A stage of a few steps on small virtual slides, for tests of whole runs."""

from __future__ import annotations

from typing import Any

D = 16
NUM_SLIDE_TOKENS = 4
NEW_MODEL = {"feature_dim": D, "hidden_size": 64, "num_layers": 1, "num_slide_tokens": NUM_SLIDE_TOKENS}
"""`model: {new: ...}` of a run of such stages."""


def small_stage(name: str, **changes: Any) -> dict[str, Any]:
    """Trains scorer, projector and adapters through the gate; a key of `changes` that is None is left out."""
    stage = {
        "name": name,
        "data": {"generate": {"name": "haystack", "count": 16, "num_patches": 24, "feature_dim": D}},
        "train": ["scorer", "projector"],
        "sparselearn": {"num_slide_tokens": NUM_SLIDE_TOKENS, "k_start": 8},
        "lora": {"r": 2, "alpha": 4},
        "steps": 3,
        "batch_size": 2,
        "warmup_steps": 0,
        "learning_rate": dict.fromkeys(("scorer", "denoiser", "projector", "lora", "decoder"), 1e-2),
    }
    return {key: value for key, value in (stage | changes).items() if value is not None}
