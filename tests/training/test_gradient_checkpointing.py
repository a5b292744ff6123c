"""`gradient_checkpointing: true` costs time and saves memory; it changes no gradient."""

import pytest
import torch

from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.training.model import SparseLearnModel, set_trainable
from vllm_wsi.training.settings import LoraSettings
from vllm_wsi.training.sparselearn import SparseLearnSettings
from vllm_wsi.training.start_model import with_lora

D, K, N = 12, 4, 200


def started(with_adapters: bool) -> SparseLearnModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, _ = new_model(TinySettings(feature_dim=D, hidden_size=64, num_layers=3, num_slide_tokens=K))
        if with_adapters:
            model.language_model = with_lora(model.language_model, LoraSettings(r=2, alpha=4))
            for name, parameter in model.language_model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter)
        return SparseLearnModel(model, SparseLearnSettings(num_slide_tokens=K, k_start=8)).train()


def batch_of(model: SparseLearnModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 250, (2, N + 9), generator=generator)
    ids[:, :N] = model.model.config.slide_token_id
    labels = ids.clone()
    labels[:, : N + 4] = -100
    return {
        "features": torch.randn(2, N, D, generator=generator),
        "num_candidates": torch.tensor([N, N]),
        "patch_mask": torch.ones(2, N, dtype=torch.bool),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(N + 9).expand(2, -1),
        "labels": labels,
    }


def step(model: SparseLearnModel) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the bytes that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.manual_seed(2)
        loss = model(**batch_of(model))["loss"]
    loss.backward()
    return (
        loss.detach(),
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        sum(kept.values()),
    )


@pytest.mark.parametrize(
    ("parts", "with_adapters"),
    [
        ({"scorer", "projector"}, False),
        ({"scorer", "projector"}, True),
        (set(), True),
        ({"projector", "decoder"}, False),
    ],
)
def test_loss_and_gradients_stay_while_the_forward_pass_keeps_less(parts, with_adapters):
    model = started(with_adapters)
    set_trainable(model, parts)
    wanted_loss, wanted, before = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None)
    loss, gradients, after = step(model)
    assert torch.allclose(loss, wanted_loss, atol=1e-6)
    assert gradients.keys() == wanted.keys()
    assert any(gradient.any() for gradient in gradients.values())
    assert all(torch.allclose(gradient, wanted[name], atol=1e-6) for name, gradient in gradients.items())
    assert after < before / 2
