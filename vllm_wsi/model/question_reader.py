"""From a question's text to the query of a checkpoint's scorer; of the decoder it needs the token embeddings alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from vllm_wsi.errors import CheckpointError, SettingsError
from vllm_wsi.selection.question_scorer import QuestionScorer
from vllm_wsi.selection.selector import SlideSelector

from .checkpoint import loading, read_config
from .config import SparseWSIConfig
from .question_text import question_ids, question_text
from .weight_files import weight_files

REMEMBERED = 1024  # questions
DECODER_PREFIX = "language_model."


class QuestionReader:
    """Makes queries of texts. Of the decoder's table only the rows of a question's tokens are read.

    Args:
        scorer: of the checkpoint, frozen.
        model: directory or hub name of the checkpoint.
        tokenizer: None: the checkpoint's is loaded.

    Raises:
        CheckpointError: it has no table of token embeddings.
    """

    def __init__(
        self,
        scorer: QuestionScorer,
        model: str,
        revision: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self._scorer, self._model = scorer, model
        with loading(model):
            self._tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, revision=revision)
        self._table, self._file = _table(model, revision)
        self.query = lru_cache(REMEMBERED)(self._query)

    def _query(self, text: str) -> Tensor:
        """fp32 [R] of a question."""
        ids = question_ids(self._tokenizer, text)
        if not ids:
            raise SettingsError("question: found an empty one, wanted a text")
        with loading(self._model), safe_open(self._file, "pt") as tensors:
            rows = tensors.get_slice(self._table)
            tokens = torch.cat([rows[one : one + 1] for one in ids])
        with torch.inference_mode():
            return self._scorer.query(tokens, torch.ones(len(ids), dtype=torch.bool)).clone()


def question_query(selector: SlideSelector, model: str, question: str) -> Tensor:
    """The query of one question for a checkpoint's selector.

    Raises:
        SettingsError: the checkpoint's scorer hears no question.
    """
    if not isinstance(selector.scorer, QuestionScorer):
        raise SettingsError(f"question: found one for {model}, wanted a checkpoint whose scorer is of kind 'question'")
    return QuestionReader(selector.scorer, model).query(question_text([question]))


def _table(model: str, revision: str | None) -> tuple[str, Path]:
    """(name of the decoder's table of token embeddings, the file that holds it)."""
    name = DECODER_PREFIX + _table_name(read_config(model, revision))
    with loading(model):
        files = weight_files(model, revision, lambda key: key == name)
    for file in files:
        with loading(model), safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - a safetensors file is no mapping
                return name, file
    raise CheckpointError(f"{model}: {name}: found no such weight, wanted the decoder's token embeddings")


def _table_name(config: SparseWSIConfig) -> str:
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(config.text_config)
    table = decoder.get_input_embeddings().weight
    return next(name for name, weight in decoder.named_parameters() if weight is table)
