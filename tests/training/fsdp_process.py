"""One of two processes of `test_fsdp.py`: a step of the training path, whole and in shards. Prints JSON."""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vllm_wsi.model.init_checkpoint import new_model
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.training.model import SparseLearnModel, set_trainable
from vllm_wsi.training.settings import LoraSettings
from vllm_wsi.training.sparselearn import SparseLearnSettings
from vllm_wsi.training.start_model import with_lora

D, K, N = 12, 4, 40


def started(dtype: torch.dtype) -> SparseLearnModel:
    torch.manual_seed(5)
    model, _ = new_model(TinySettings(feature_dim=D, hidden_size=64, num_layers=2, num_slide_tokens=K))
    model.language_model.to(dtype)
    model.language_model = with_lora(model.language_model, LoraSettings(r=2, alpha=4))
    wrapped = SparseLearnModel(model, SparseLearnSettings(num_slide_tokens=K, k_start=8))
    set_trainable(wrapped, {"scorer", "projector"})
    return wrapped


def batch_of(model: SparseLearnModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 250, (2, N + 9))
    ids[:, :N] = model.model.config.slide_token_id
    labels = ids.clone()
    labels[:, : N + 4] = -100
    return {
        "features": torch.randn(2, N, D),
        "num_candidates": torch.tensor([N, N]),
        "patch_mask": torch.ones(2, N, dtype=torch.bool),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(N + 9).expand(2, -1),
        "labels": labels,
    }


def step(model: SparseLearnModel) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and whole gradients, means over the processes."""
    torch.manual_seed(10 + dist.get_rank())
    loss = model(**batch_of(model))["loss"]
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradients[name] = gradient.full_tensor()
        elif gradient is not None:
            dist.all_reduce(gradient)
            gradients[name] = gradient / dist.get_world_size()
    return loss.item(), gradients


def main() -> None:
    dist.init_process_group("gloo")
    dtype, mixed = getattr(torch, sys.argv[1]), sys.argv[2] == "mixed"
    wanted_loss, wanted = step(started(dtype))
    model = started(dtype)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.language_model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    shard = sum(one.to_local().numel() for one in model.parameters())
    loss, gradients = step(model)
    parts = ("model.scorer.", "model.projector.", "lora_B")
    largest = {part: max(one.abs().max().item() for name, one in wanted.items() if part in name) for part in parts}
    error = max((gradients[name] - wanted[name]).abs().max().item() for name in wanted)
    if dist.get_rank() == 0:
        total = sum(one.numel() for one in model.parameters())
        names = gradients.keys() == wanted.keys()
        print(
            json.dumps(
                {"loss": loss - wanted_loss, "error": error, "share": shard / total, "names": names, "largest": largest}
            )
        )
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # now and then a thread of torch's is still there when the interpreter ends, which aborts the process


main()
