"""The checkpoint that a study judges."""

from __future__ import annotations

from pathlib import Path

from vllm_wsi.errors import SettingsError
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.selection.question_scorer import QuestionScorer


def study_model(checkpoint: str | Path) -> SparseWSIForConditionalGeneration:
    """Reads it, for evaluation.

    Raises:
        SettingsError: its scorer hears the question, and studies compare selections of whole slides.
    """
    model = SparseWSIForConditionalGeneration.from_pretrained(checkpoint)
    if isinstance(model.scorer, QuestionScorer):
        raise SettingsError(
            f"{checkpoint}: scorer: found one that hears the question, wanted another kind: a study selects without one"
        )
    return model.eval()
