"""The model as training runs it: all patches through the gate, and the answer's loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_wsi.errors import SettingsError, SlideError
from vllm_wsi.model.chat_renderer import IGNORED
from vllm_wsi.model.modeling import SparseWSIForConditionalGeneration
from vllm_wsi.selection.question_scorer import QuestionScorer
from vllm_wsi.selection.scorer import score_slides

from .shared_prefix import attend_to_shared_prefix, branch_mask
from .sparselearn import SparseLearn, SparseLearnSettings


class SparseLearnModel(nn.Module):
    """The soft path around a checkpoint's model: all patches pass the gate, after `eval()` too. The path of inference,
    the scorer and its Hard Top-K, is `model.selector()` and `model.generate`; they do not use this class.

    Args:
        model: holds scorer, projector and decoder, and is all that remains after training.
        settings: of the gate; None lets every patch through, and the scorer takes no part.
        previous: of the stage before; a denoiser of the same kind goes on from it.
    """

    accepts_loss_kwargs = True  # transformers.Trainer: `num_items_in_batch`

    def __init__(
        self,
        model: SparseWSIForConditionalGeneration,
        settings: SparseLearnSettings | None,
        previous: SparseLearn | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.sparselearn = None if settings is None else SparseLearn(model.config.feature_dim, settings, previous)
        self.last_alpha: Tensor | None = None  # fp32 [S, n] of the last batch, for logs

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Of the decoder, where the memory goes; for `trainer: {gradient_checkpointing: true}`."""
        self.model.language_model.gradient_checkpointing_enable(**options)

    # Many parameters: a batch is handed over by the names of its tensors.
    def forward(
        self,
        features: Tensor,
        num_candidates: Tensor,
        patch_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        branches: Tensor | None = None,
        question_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Mean negative log-likelihood of the labelled tokens (over `num_items_in_batch`, where given).

        Shapes as `batches.collate` makes them.
        """
        logits, wanted = self.tail_logits(
            features,
            num_candidates,
            patch_mask,
            input_ids,
            attention_mask,
            position_ids,
            labels,
            branches,
            question_ids,
        )
        total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
        count = (wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count + self._nothing()}

    # Many parameters: as `forward`.
    def tail_logits(
        self,
        features: Tensor,
        num_candidates: Tensor,
        patch_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        branches: Tensor | None = None,
        question_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logits fp32 [B, t, vocabulary], the labels [B, t] that they should give) of the last t tokens, which hold
        all labelled ones: prompts are padded on the left.

        A patch without a finite score is neither gated nor seen by the decoder, as in service. With `branches`, several
        conversations share their slides' tokens: each labelled token gets the logits that its conversation gives
        alone, except that the gate draws one noise for all of them.

        Raises:
            SlideError: no patch of a slide has a finite score.
            SettingsError: FSDP hands out the scorer's weights in half precision.
        """
        model = self.model
        if (dtype := next(model.scorer.parameters()).dtype) != torch.float32:
            raise SettingsError(
                f"trainer: found the scorer in {str(dtype).removeprefix('torch.')} within a step, wanted float32; "
                "under FSDP leave out bf16 and fp16, and give the decoder its dtype (model: dtype)"
            )
        places = (input_ids == model.config.slide_token_id) & attention_mask.bool()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.sparselearn is not None):
            scores, scored, free = score_slides(model.scorer, features, patch_mask, self._query(question_ids))
        if not torch.equal(scored, patch_mask):
            refuse_unscored(scored)
            num_candidates = num_candidates - (patch_mask & ~scored).sum(dim=-1)
            features = features.masked_fill(~scored[..., None], 0)
            attention_mask = attention_mask.masked_scatter(places, scored[patch_mask].to(attention_mask.dtype))
        patches = model.projector.normalise(features)
        if self.sparselearn is not None:
            patches, alpha = self.sparselearn(patches, scores, scored, free, model.free_share)
            self.last_alpha = alpha.detach()
        tokens = model.projector.project(patches, scores, num_candidates[:, None])
        embeddings = model.get_input_embeddings()(input_ids)
        embeddings = embeddings.masked_scatter(places[..., None], tokens[patch_mask].to(embeddings.dtype))
        tail = labels.shape[1] - int((labels != IGNORED).any(dim=0).int().argmax())
        if branches is not None:
            attend_to_shared_prefix(model.language_model)
        logits = model.language_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask if branches is None else branch_mask(attention_mask, branches),
            position_ids=position_ids,
            logits_to_keep=tail + 1,
            use_cache=False,
        ).logits
        return logits[:, -tail - 1 : -1].float(), labels[:, -tail:]

    def _nothing(self) -> Tensor | float:
        """0, with a gradient of 0 for each parameter of a `QuestionScorer`. In a step where one of its two queries
        chooses no patch, the parameters behind that would have no gradient, for which several processes would wait."""
        scorer = self.model.scorer
        if self.sparselearn is None or not isinstance(scorer, QuestionScorer):
            return 0.0
        return 0.0 * torch.stack([one.sum() for one in scorer.parameters()]).sum()

    def _query(self, question_ids: Tensor | None) -> Tensor | None:
        """a(q) [S, R] of the questions about the batch's slides."""
        return None if question_ids is None else self.model.query(question_ids)


def refuse_unscored(scored: Tensor) -> None:
    """Raises SlideError unless each slide has a patch with a finite score; `scored` is bool [S, n]."""
    if len(bad := (~scored.any(dim=-1)).nonzero()[:, 0].tolist()):
        raise SlideError(
            f"slide {bad[0] + 1} of {len(scored)} in the batch: features: found no patch with a finite score, "
            "wanted at least one"
        )


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """What a resumed run cannot take from elsewhere: the parameters under training, and SparseLearn's buffers."""
    state = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    state |= {name: b for name, b in module.named_buffers() if name.startswith("sparselearn.")}
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def set_trainable(module: SparseLearnModel, parts: set[str]) -> None:
    """Leaves gradients to the named parts (scorer, projector, decoder), to adapters, and to the denoiser."""
    module.requires_grad_(False)
    model = module.model
    for name, part in (("scorer", model.scorer), ("projector", model.projector), ("decoder", model.language_model)):
        part.requires_grad_(name in parts)
    for name, parameter in model.language_model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    if module.sparselearn is not None:
        module.sparselearn.requires_grad_(True)
