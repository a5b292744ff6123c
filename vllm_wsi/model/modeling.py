"""SparseWSIForConditionalGeneration for transformers: training, and the oracle for serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vllm_wsi.selection.question_scorer import QuestionScorer
from vllm_wsi.selection.scorer import build_scorer, frozen_scorer
from vllm_wsi.selection.selection import Selection, check_summary
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides.encoder_names import Mismatch

from .config import FP32_PARTS, SparseWSIConfig
from .prompt_layout import PatchRows, lay_out, repeated
from .question_text import NO_TOKEN

PromptIds: TypeAlias = Tensor | NDArray[np.integer] | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Any]


SCORE_SCALE, MIDDLE_LENGTH, LENGTH_SCALE = 4.0, 8.0, 2.0
"""A projector reads score / 4 and (ln N - 8) / 2, so that both are near 1 in size, from 100 patches to 1,000,000. A
length that hardly varies is learned too slowly."""


class SlideProjector(nn.Module):
    """From patches to the decoder's embeddings: normalise, Linear(d, m), GELU, Linear(m, decoder). Where a token says
    how its patch scored, Linear(2, m) of its score and of ln N stands beside the first, or in its place.

    Args:
        feature_dim: d.
        hidden_size: m.
        decoder_size: of the decoder's embeddings.
        input_norm: whether each patch is brought to mean 0 and variance 1 first. The noise gate of the training
            path (`training/sparselearn.py`) needs that, and stands between the two steps.
        inputs: what each token says of its patch, some of `PROJECTOR_INPUTS`.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_size: int,
        decoder_size: int,
        input_norm: bool = True,
        inputs: Sequence[str] = ("features",),
    ) -> None:
        super().__init__()
        self.input_norm = input_norm
        self.linear_1 = nn.Linear(feature_dim, hidden_size) if "features" in inputs else None
        self.linear_score = nn.Linear(2, hidden_size) if "score" in inputs else None
        self.linear_2 = nn.Linear(hidden_size, decoder_size)

    @classmethod
    def from_config(cls, config: SparseWSIConfig) -> SlideProjector:
        settings = config.projector
        return cls(
            config.feature_dim,
            settings["hidden_size"],
            config.text_config.hidden_size,
            settings["input_norm"],
            settings["inputs"],
        )

    def normalise(self, features: Tensor) -> Tensor:
        """fp32 [..., d] of features [..., d] of any floating dtype."""
        return F.layer_norm(features.float(), features.shape[-1:]) if self.input_norm else features.float()

    def project(self, normalised: Tensor, scores: Tensor, num_candidates: Tensor) -> Tensor:
        """Embeddings [..., decoder].

        Args:
            normalised: [..., d], of `normalise`.
            scores: [...], the scorer's.
            num_candidates: int64, the patches of its slide that were scored, of a shape that broadcasts to that of
                `scores`.
        """
        hidden = []
        if self.linear_1 is not None:
            hidden.append(self.linear_1(normalised.to(self.linear_1.weight.dtype)))
        if self.linear_score is not None:
            length = (num_candidates.to(scores.device).log() - MIDDLE_LENGTH) / LENGTH_SCALE
            told = torch.stack((scores / SCORE_SCALE, length.expand_as(scores)), dim=-1)
            hidden.append(self.linear_score(told.to(self.linear_score.weight.dtype)))
        return self.linear_2(F.gelu(sum(hidden[1:], hidden[0])))

    def forward(self, features: Tensor, scores: Tensor, num_candidates: Tensor) -> Tensor:
        """Embeddings [..., decoder] of features [..., d]; the rest as for `project`."""
        device = self.linear_2.weight.device
        return self.project(self.normalise(features.to(device)), scores.to(device), num_candidates)


class SparseWSIForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A causal decoder whose prompts hold the K best patches of slides.

    Weights carry the prefixes `scorer.`, `projector.` and `language_model.`. Prompts hold one slide token for each
    slide; `prepare` lays out the kept patches in its place. Selections come from `selector()`.

    Scorer and projector are fp32 (`FP32_PARTS`); `dtype`, in arguments of `from_pretrained` too, is the decoder's.
    """

    config_class = SparseWSIConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = list(FP32_PARTS)
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: SparseWSIConfig, language_model: nn.Module | None = None) -> None:
        """`language_model`: a decoder that is loaded already; None makes one with new weights."""
        super().__init__(config)
        self.scorer = build_scorer(**config.scorer_options)
        self.projector = SlideProjector.from_config(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self._tied_weights_keys = {
            f"language_model.{key}": f"language_model.{value}"
            for key, value in (self.language_model._tied_weights_keys or {}).items()
        }
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """The decoder's; `save_pretrained` writes it into config.json."""
        return self.language_model.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    @property
    def free_share(self) -> float:
        """Of K, that a question does not choose."""
        scorer = self.scorer
        return scorer.free_tokens / scorer.num_slide_tokens if isinstance(scorer, QuestionScorer) else 0.0

    def query(self, question_ids: Tensor) -> Tensor | None:
        """What a `QuestionScorer` makes of questions; None for a scorer of another kind.

        Args:
            question_ids: int64 [..., t], of the question's text alone (`question_text`), `NO_TOKEN` at padding.

        Returns:
            fp32 [..., R]. No gradient passes into the decoder's table.
        """
        if not isinstance(self.scorer, QuestionScorer):
            return None
        mask = question_ids != NO_TOKEN
        with torch.no_grad():
            tokens = self.get_input_embeddings()(question_ids.clamp_min(0))
        with torch.autocast(question_ids.device.type, enabled=False):
            return self.scorer.query(tokens, mask)

    def selector(self, encoder_mismatch: Mismatch = "refuse") -> SlideSelector:
        """The Hard Top-K of this model's scorer, as serving runs it."""
        return SlideSelector(
            frozen_scorer(self.scorer),
            self.config.num_slide_tokens,
            max_patches=self.config.max_patches,
            summary_tokens=self.config.summary_tokens,
            encoder=self.config.encoder_check(encoder_mismatch),
        )

    def prepare(self, input_ids: Tensor, selections: Sequence[Selection]) -> tuple[Tensor, Tensor]:
        """Lays out one prompt: slide tokens for each slide's placeholder, and RoPE positions.

        Args:
            input_ids: int64 [T] with one slide token for each slide.
            selections: one for each slide, in the order of the prompt.

        Returns:
            (embeddings [1, T', hidden], positions int64 [1, T']); T' = T + sum(num_tokens - 1).

        Raises:
            ValueError: the prompt's slide tokens and the selections differ in number, or a selection has other summary
                tokens than the checkpoint was trained with.
        """
        for one in selections:
            check_summary(one, self.config.summary_tokens)
        slides = [PatchRows(one.indices, one.num_patches, one.num_summary_tokens) for one in selections]
        config, ids = self.config, input_ids.cpu()
        layout = lay_out(ids, slides, config.slide_token_id, config.slide_position_budget)
        ids = repeated(ids, layout.repeats).to(input_ids.device)
        embeddings = self.get_input_embeddings()(ids)
        if selections:
            patches = torch.cat([self._slide_tokens(one) for one in selections])
            is_patch = (ids == config.slide_token_id)[:, None]
            embeddings = embeddings.masked_scatter(is_patch, patches.to(embeddings.dtype))
        return embeddings[None], layout.positions[None].to(self.device)

    def _slide_tokens(self, chosen: Selection) -> Tensor:
        """Embeddings [num_tokens, hidden]. A projector that reads scores reads this model's own, whoever chose."""
        scores = chosen.scores
        if self.projector.linear_score is not None:
            scores = self.scorer(chosen.features.to(self.device)).detach()
        return self.projector(chosen.rows, scores, torch.tensor(chosen.num_candidates))

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The decoder over a prepared prompt (or over text alone, by `input_ids`)."""
        return self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            labels=labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, input_ids: PromptIds, selections: Sequence[Selection] = (), **kwargs: Any) -> Any:
        """Answers one prompt, and ends where the checkpoint's `generation_config.json` says, as the server does.

        Args:
            input_ids: one prompt's token ids as `apply_chat_template` returns them, with one slide token for each
                slide: a list, an integer tensor or array [T] or [1, T], or a mapping that holds one as `input_ids`.
            selections: one for each slide.
            kwargs: as for transformers' `generate`.

        Returns:
            What the decoder's `generate` returns for embeddings: the new tokens alone.

        Raises:
            ValueError: other ids, or slide tokens and selections that differ in number.
        """
        if (given := kwargs.pop("attention_mask", None)) is not None and not torch.as_tensor(given).all():
            raise ValueError("attention_mask: found zeros, wanted one prompt without padding")
        ids = prompt_tensor(input_ids, self.config.text_config.vocab_size).to(self.device)
        embeddings, positions = self.prepare(ids, selections)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        if "generation_config" not in kwargs:  # beside it, transformers warns of every other option
            self.language_model.generation_config = self.generation_config
        return self.language_model.generate(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, **kwargs
        )


def prompt_tensor(input_ids: PromptIds, vocab_size: int) -> Tensor:
    """int64 [T] of one prompt's token ids in any of the forms that `generate` takes. Raises ValueError."""
    if isinstance(input_ids, Mapping):
        input_ids = input_ids.get("input_ids", ())
    wanted = "wanted one prompt's token ids, as tokenizer.apply_chat_template(...) returns them"
    try:
        ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"input_ids: found {_in_short(input_ids)}, {wanted}") from None
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or not len(ids) or ids.dtype.is_floating_point or ids.dtype in (torch.bool, torch.complex64):
        raise ValueError(f"input_ids: found {_in_short(input_ids)} of shape {tuple(ids.shape)}, {wanted}")
    if not (worst := int(ids.min())) >= 0 or (worst := int(ids.max())) >= vocab_size:
        raise ValueError(f"input_ids: found id {worst}, wanted 0 .. {vocab_size - 1}, as the decoder has them")
    return ids.long()


def _in_short(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, (list, tuple)) and len(value):
        return f"a {kind} of {type(value[0]).__name__}"
    return f"{value.dtype} {kind}" if hasattr(value, "dtype") else f"a {kind}"


AutoModelForCausalLM.register(SparseWSIConfig, SparseWSIForConditionalGeneration, exist_ok=True)
