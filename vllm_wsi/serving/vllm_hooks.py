"""Everything that this plugin changes in vLLM.

vLLM has entry points for plugins, a model registry and a registry of media connectors; these carry the plugin
(`plugin.py`, `endpoint.py`, `connector.py`). Where vLLM offers none, a function of vLLM is wrapped: `HOOKS` lists
each such function, the wrapper, and the reason. Nothing else of vLLM is changed, except two things of one server:

- `VLLM_MEDIA_CONNECTOR` is set, so that media are fetched through `SlideConnector` (`processor.use_slide_connector`);
- the engine client's `shutdown` answers open requests (`open_requests.end_with_engine`).

The log of `vllm_wsi` goes to vLLM's handlers too.

A wrapper takes vLLM's function and returns the one that takes its place. A wrapped function is marked, so that a second
call of `install` changes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from vllm_wsi.model.question_reader import QuestionReader
    from vllm_wsi.selection.calibration import Calibration
    from vllm_wsi.selection.selector import SlideSelector
    from vllm_wsi.store.store_settings import StoreSettings

    from .service import SelectionService

Stage = Literal["every process", "API server", "model"]
MARK = "__vllm_wsi_hook__"


class Hook(NamedTuple):
    """One function of vLLM that is wrapped."""

    target: str  # module:function or module:Class.method
    wrapper: str  # module of this room:function
    reason: str
    target_0_33: str = ""  # from vLLM 0.33 on, where it lies elsewhere

    def place(self) -> tuple[Any, str]:
        """The module or class of this vLLM that holds the function, and the function's name there."""
        if self.target_0_33:
            with suppress(ImportError, AttributeError):
                return _owner(self.target_0_33)
        return _owner(self.target)


HOOKS: dict[Stage, tuple[Hook, ...]] = {
    "every process": (
        Hook(
            "vllm.engine.arg_utils:EngineArgs.add_cli_args",
            "plugin_flag:with_plugin_flag",
            "`vllm serve --plugin NAME`: vLLM knows the environment variable VLLM_PLUGINS alone",
        ),
    ),
    "API server": (
        Hook(
            "vllm.v1.engine.input_processor:InputProcessor._validate_model_input",
            "prompt_guard:refusing_typed_slide_tokens",
            "a slide token that a user types: a prompt of text alone reaches no multimodal processor",
        ),
        Hook(
            "vllm.renderers.chat_utils:_get_embeds_data",
            "prompt_guard:refusing_embeds_without_data",
            "an `image_embeds` part of any other JSON would raise an error that becomes an HTTP 500",
            target_0_33="vllm.renderers.chat_utils.item_tracker:_get_embeds_data",
        ),
        Hook(
            "vllm.renderers.chat_utils:AsyncMultiModalContentParser.parse_image_pil",
            "prompt_guard:refusing_json_pictures",
            "an `image_pil` part of a JSON request is no picture, which vLLM 0.33 finds out by an HTTP 500",
            target_0_33="vllm.renderers.chat_utils.content_parser:AsyncMultiModalContentParser.parse_image_pil",
        ),
        Hook(
            "vllm.renderers.base:BaseRenderer.render_chat",
            "question_hook:telling_slides_the_question",
            "a slide is fetched and selected before the prompt is known, and a scorer may hear the question",
        ),
        Hook(
            "vllm.renderers.base:BaseRenderer.render_chat_async",
            "question_hook:telling_slides_the_question",
            "the same in a server",
        ),
        Hook(
            "vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware.__call__",
            "key_guard:asking_for_the_key",
            "with an API key, vLLM guards `/v1` and its like; other routes parse messages and fetch slides too",
        ),
        Hook(
            "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
            "adapters:refusing_with_400",
            "an adapter that `adapters.check_adapter` refuses is the client's fault: HTTP 400, not 500",
        ),
        Hook(
            "vllm.v1.engine.llm_engine:LLMEngine.add_request",
            "adapters:loading_adapters_first",
            "`vllm.LLM` loads an adapter within a step, where a refusal would end the engine",
        ),
    ),
    "model": (
        Hook(
            "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
            "adapters:checking_adapters",
            "vLLM leaves out the weights of an adapter that it finds no module for, without a word",
        ),
    ),
}


def install(stage: Stage) -> None:
    """Wraps the functions of one stage, each once in a process, however often this is called."""
    if stage == "API server":
        _show_our_log()
    for hook in HOOKS[stage]:
        owner, name = hook.place()
        original = getattr(owner, name)
        if getattr(original, MARK, None) == hook.wrapper:
            continue
        module, function = hook.wrapper.split(":")
        wrapped: Callable[..., Any] = getattr(import_module(f".{module}", __package__), function)(original)
        setattr(wrapped, MARK, hook.wrapper)
        is_static = isinstance(owner, type) and isinstance(owner.__dict__.get(name), staticmethod)
        setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


def _show_our_log() -> None:
    """vLLM shows the log of its own packages alone."""
    ours = logging.getLogger("vllm_wsi")
    if not ours.handlers:
        ours.setLevel(logging.INFO)
        for handler in logging.getLogger("vllm").handlers:
            ours.addHandler(handler)


def _owner(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    *classes, name = path.split(".")
    owner: Any = import_module(module)
    for one in classes:
        owner = getattr(owner, one)
    getattr(owner, name)
    return owner, name


# vLLM makes a media connector for each chat request, by its name in a registry, and passes it paths and domains alone.
# So the connector must find the service by itself: this is the one piece of state that all of a process shares.
_services: dict[tuple[object, ...], SelectionService] = {}
_current: SelectionService | None = None
_lock = threading.Lock()


def service_for(
    selector: SlideSelector,
    scorer: str,
    max_slide_tokens: int,
    store: StoreSettings | None = None,
    questions: partial[QuestionReader] | None = None,
    calibration: Calibration | None = None,
) -> SelectionService:
    """The process-wide service of one checkpoint and setting, which also becomes the current one.

    vLLM makes a processor for every chat request; the service, its cache and its threads stay.
    """
    from vllm_wsi.store.selection_store import SelectionStore

    from . import metrics
    from .service import SelectionService

    global _current
    asked_of = None if questions is None else questions.args[1:]  # the checkpoint whose tokens make the queries
    rules = (selector.num_slide_tokens, selector.device.wanted, selector.max_patches, max_slide_tokens)
    key = (scorer, *rules, store, asked_of, calibration)
    with _lock:
        if key not in _services:
            opened = None if store is None else SelectionStore(*store, metrics.count_store)
            _services[key] = SelectionService(
                selector, scorer, max_slide_tokens, opened, None if questions is None else questions(), calibration
            )
        _current = _services[key]
        return _current


def current_service() -> SelectionService | None:
    """The service of the checkpoint that was set up last in this process; None where none was."""
    return _current


def close_services() -> None:
    """Ends all selections of this process; nothing is selected in it any more."""
    with _lock:
        services = list(_services.values())
        _services.clear()
    for service in services:
        service.close()
