"""LoRA adapters. Their weights may be named as in the decoder or as in the whole model. An adapter that would change
nothing is an error: vLLM itself skips weights that fit no module, and does not say so. Here every weight of an adapter
is checked before it is loaded, in the process that holds the model; the API server turns the refusal into an HTTP 400.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import (
    get_adapter_absolute_path,
    is_base_embedding_weights,
    is_in_target_modules,
    parse_fine_tuned_lora_name,
)
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer, WeightsMapper

from vllm_wsi.errors import WsiError
from vllm_wsi.model.config import SparseWSIConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MARK, CALLER = "LoRA adapter ", "', please check the stack trace above"
HALF_B = re.compile(r"\.lora_(embedding_)?B\b")
PICKLES = ("adapter_model.bin", "adapter_model.pt")

DECODER_NAMES = WeightsMapper(
    orig_to_new_regex={
        # peft within our model, as `vllm-wsi train` has it
        re.compile(r"^(?:model\.)?language_model\.base_model\.model\."): "language_model.",
        # peft around the decoder: with its head, and without
        re.compile(r"^(?=(?:layers|embed_tokens)\.)"): "model.",
        re.compile(r"^(?!(?:language_model|projector|scorer)\.)"): "language_model.",
    }
)
"""From the names of a text decoder, and of training, to the served model's."""


class AdapterError(WsiError):
    """An adapter that does not fit the served model; one sentence."""


def check_adapter(folder: Path, manager: LoRAModelManager) -> None:
    """Whether every weight of an adapter takes effect in the manager's model.

    Raises:
        AdapterError: one does not, or all together change nothing.
    """
    if not (folder / WEIGHTS).is_file():
        if pickles := [name for name in PICKLES if (folder / name).is_file()]:
            raise AdapterError(f"{MARK}{folder.name}: found {pickles[0]}, a pickle, wanted {WEIGHTS}")
        return  # vLLM says that there is none
    file = f"{MARK}{folder.name}/{WEIGHTS}"  # vLLM strikes whole paths out of what it tells a client
    try:
        with safe_open(folder / WEIGHTS, "pt") as tensors:
            names = [name for name in sorted(tensors.keys()) if not is_base_embedding_weights(name)]
            found = {name: tensors.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise AdapterError(f"{file}: found no safetensors ({error}), wanted an adapter's weights") from error
    _check_weights(file, found, manager)
    changes = any(bool(tensor.any()) for name, tensor in found.items() if HALF_B.search(name))
    if not changes or _alpha(folder) == 0:
        raise AdapterError(
            f"{file}: lora_B: found zeros alone, or lora_alpha 0, wanted an adapter that changes something"
        )


def _alpha(folder: Path) -> float | None:
    try:
        return json.loads((folder / CONFIG).read_text()).get("lora_alpha")
    except (OSError, ValueError, AttributeError):
        return None  # vLLM says what is wrong with it


def _check_weights(file: str, found: dict[str, Tensor], manager: LoRAModelManager) -> None:
    layers = _layers(manager)
    parts: dict[str, dict[bool, str]] = {}  # of each module: its A (True) and its B, as the file names them
    is_elsewhere = False
    for name, tensor in found.items():
        try:
            module, is_a = parse_fine_tuned_lora_name(name, DECODER_NAMES)
        except ValueError:
            raise AdapterError(f"{file}: found {name}, wanted weights of lora_A and lora_B alone") from None
        module = module.removesuffix(".base_layer")
        if module in layers:
            parts.setdefault(module, {})[is_a] = name
            _check_shape(file, name, tensor, is_a, *layers[module])
        elif _is_left_out(module, manager):
            is_elsewhere = True
        else:
            wanted = next((one for one in layers if one not in manager.packed_modules), "none")
            raise AdapterError(f"{file}: {name}: found no module {module} to adapt, wanted ones like {wanted}")
    for part in parts.values():
        if len(part) == 1:
            (name,) = part.values()
            raise AdapterError(f"{file}: {name}: found no other half, wanted lora_A and lora_B")
    if not parts and not (is_elsewhere and manager.lora_config.target_modules is None):
        raise AdapterError(f"{file}: found no weights that this server adapts, wanted some")


def _layers(manager: LoRAModelManager) -> dict[str, tuple[BaseLayerWithLoRA, int]]:
    """What can be adapted, as adapters name it: the layer, and which of its slices."""
    found = {name: (layer, 0) for name, layer in manager.modules.items()}
    for packed, names in manager.packed_modules.items():
        found |= {name: (manager.modules[packed], place) for place, name in enumerate(names)}
    return found


def _is_left_out(module: str, manager: LoRAModelManager) -> bool:
    """Whether the server was told to leave a module out, or another process of the pipeline holds it."""
    if not is_in_target_modules(module, manager.lora_config.target_modules, manager.packed_modules_mapping):
        return True
    inner: Any = manager.model
    for part in module.split("."):
        inner = getattr(inner, part, None)
        if isinstance(inner, PPMissingLayer):
            return True
    return False


def _check_shape(file: str, name: str, tensor: Tensor, is_a: bool, layer: BaseLayerWithLoRA, place: int) -> None:
    """Compares a matrix with vLLM's buffer, because vLLM copies a smaller matrix into the buffer's corner without an
    error. Under tensor parallelism the sizes differ, and nothing is checked."""
    if not isinstance(layer, BaseLinearLayerWithLoRA) or layer.tp_size > 1:
        return
    buffers = layer.lora_a_stacked if is_a else layer.lora_b_stacked
    if place >= len(buffers):
        return
    axis = 1 if is_a else 0
    wanted = buffers[place].shape[-1 if is_a else -2]
    if tensor.ndim != 2 or tensor.shape[axis] != wanted:
        side = f"(rank, {wanted})" if is_a else f"({wanted}, rank)"
        raise AdapterError(f"{file}: {name}: found shape {tuple(tensor.shape)}, wanted {side}")


def checking_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `WorkerLoRAManager._load_adapter`, in the process that holds the model."""

    def load(self: WorkerLoRAManager, lora_request: LoRARequest) -> Any:
        manager = self._adapter_manager
        if getattr(manager.model, "hf_to_vllm_mapper", None) is DECODER_NAMES:
            check_adapter(Path(get_adapter_absolute_path(lora_request.lora_path)), manager)
        return original(self, lora_request)

    return load


def refusing_with_400(original: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wraps `OpenAIServingModels.load_lora_adapter`: what the check refuses is the client's fault, not the server's."""
    from vllm.entrypoints.serve import create_error_response
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    async def load(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        answer = await original(self, request, base_model_name)
        if isinstance(answer, ErrorResponse) and answer.error.code == HTTPStatus.INTERNAL_SERVER_ERROR:
            _, mark, sentence = answer.error.message.partition(MARK)
            if mark:
                sentence = mark + sentence.partition(CALLER)[0]
                return create_error_response(sentence, "BadRequestError", HTTPStatus.BAD_REQUEST)
        return answer

    return load


def loading_adapters_first(original: Callable[..., str]) -> Callable[..., str]:
    """Wraps `LLMEngine.add_request`, behind `vllm.LLM`: an adapter is loaded before the request is queued."""

    def add(self: Any, *args: Any, lora_request: LoRARequest | None = None, **kwargs: Any) -> str:
        if lora_request is not None and isinstance(self.model_config.hf_config, SparseWSIConfig):
            loaded = self.__dict__.setdefault("wsi_adapters", set())
            if lora_request.lora_int_id not in loaded:
                self.add_lora(lora_request)
                loaded.add(lora_request.lora_int_id)
        return original(self, *args, lora_request=lora_request, **kwargs)

    return add
