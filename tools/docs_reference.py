"""The reference that is made of the code: commands, settings, routes, metrics, and what is changed in vLLM.

`tools/docs_site.py` puts each part in the place of its mark, `<!-- generated: NAME -->`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import prometheus_client
import typer
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

from vllm_wsi.cli.app import PROGRAM, app
from vllm_wsi.model.tiny_settings import TinySettings
from vllm_wsi.serving import metrics, vllm_hooks
from vllm_wsi.serving.server_options import ServerOptions
from vllm_wsi.study.calibrate import CalibrateSettings
from vllm_wsi.training.settings import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    SparseLearnSettings,
    StageSettings,
    TrainSettings,
)


def commands() -> str:
    """Every command and option of `vllm-wsi`, as Typer writes them."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name=PROGRAM), name=PROGRAM)
    return text.partition("\n")[2]  # without the heading: the page has one


def training_settings() -> str:
    """The YAML file of `vllm-wsi train`."""
    groups = {
        "The file": TrainSettings,
        "`model`": ModelSettings,
        "`model: new`": TinySettings,
        "`stages`: each of them": StageSettings,
        "`data`": DataSettings,
        "`sparselearn`": SparseLearnSettings,
        "`lora`": LoraSettings,
    }
    return "\n".join(f"### {title}\n\n{_first_paragraph(kind)}\n\n{_fields(kind)}" for title, kind in groups.items())


def server_options() -> str:
    """`--mm-processor-kwargs` of `vllm serve`."""
    return _fields(ServerOptions)


def calibration_settings() -> str:
    """The YAML file of `vllm-wsi calibrate`."""
    return _fields(CalibrateSettings)


def routes() -> str:
    """The routes of the endpoint plugin, from their OpenAPI."""
    from vllm_wsi.serving.endpoint import SelectEndpoint  # loads vLLM

    server = FastAPI()
    SelectEndpoint().attach_router(server)
    document = server.openapi()
    parts = []
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts.append(f"## {method.upper()} {path}\n\n{_required(route, 'description', path)}\n")
            rows = [_parameter(one, document) for one in route.get("parameters", ())]
            if "requestBody" in route:
                rows += _body(route["requestBody"], document)
            if rows:
                parts.append(_table(("name", "in", "type", "default", "what"), rows))
    return "\n".join(parts)


def metric_table() -> str:
    """What the plugin adds to `/metrics`."""
    kinds = (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)
    found = [one for one in vars(metrics).values() if isinstance(one, kinds)]
    rows = [
        (f"`{one._name}`", one._type, ", ".join(f"`{label}`" for label in one._labelnames), one._documentation)
        for one in found
    ]
    return _table(("name", "kind", "labels", "what"), rows)


def vllm_changes() -> str:
    """Each function of vLLM that is wrapped, and why."""
    rows = [
        (f"`{hook.target}`", stage, f"`{hook.wrapper.replace(':', '.py`: `')}`", hook.reason)
        for stage, hooks in vllm_hooks.HOOKS.items()
        for hook in hooks
    ]
    return _table(("function of vLLM", "in", "wrapped by", "why"), rows)


def _fields(kind: type[BaseModel]) -> str:
    rows = [
        (f"`{name}`", _type(field.annotation), _default(field), _described(kind, name, field))
        for name, field in kind.model_fields.items()
    ]
    return _table(("key", "type", "default", "what"), rows)


def _described(kind: type[BaseModel], name: str, field: FieldInfo) -> str:
    """The field's own words and its bounds."""
    if not field.description:
        raise ValueError(f"{kind.__name__}: {name}: found no docstring below it, wanted one, for the reference")
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}
    bounds = [
        f"{words} {getattr(one, sign):g}"
        for one in field.metadata
        for sign, words in signs.items()
        if hasattr(one, sign)
    ]
    return " ".join([" ".join(field.description.split()), *([f"({', '.join(bounds)})"] if bounds else [])])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else f"`{json.dumps(value)}`" if isinstance(value, bool | tuple) else f"`{value}`"


def _type(annotation: Any) -> str:
    """A type as YAML has it."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{one}`" for one in parts)
    if get_origin(annotation) in (list, tuple):
        return f"list of {_type(parts[0])}"
    if get_origin(annotation) is dict:
        return f"map of {_type(parts[0])} to {_type(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a group"
    if parts:
        return " or ".join(_type(one) for one in parts if one is not NoneType)
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any value"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(annotation, {"Path": "path"}.get(name, name))


def _parameter(one: dict[str, Any], document: dict[str, Any]) -> Sequence[str]:
    schema = one["schema"]
    what = _required(one, "description", one["name"])
    return f"`{one['name']}`", one["in"], _schema_type(schema, document), _schema_default(schema, one), what


def _schema_default(schema: dict[str, Any], holder: dict[str, Any]) -> str:
    if holder.get("required"):
        return "required"
    return f"`{schema['default']}`".lower() if schema.get("default") is not None else "none"


def _body(body: dict[str, Any], document: dict[str, Any]) -> Iterable[Sequence[str]]:
    model = _resolved(body["content"]["application/json"]["schema"], document)
    for name, schema in model["properties"].items():
        default = "required" if name in model.get("required", ()) else "none"
        yield f"`{name}`", "body", _schema_type(schema, document), default, _required(schema, "description", name)


def _schema_type(schema: dict[str, Any], document: dict[str, Any]) -> str:
    schema = _resolved(schema, document)
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    kinds = [_schema_type(one, document) for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    return " or ".join(kinds) if kinds else schema["type"]


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _first_paragraph(kind: type[BaseModel]) -> str:
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())


def _required(values: dict[str, Any], key: str, where: str) -> str:
    if not values.get(key):
        raise ValueError(f"{where}: found no {key}, wanted a docstring, for the reference")
    return values[key]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "server-options": server_options,
    "training-settings": training_settings,
    "calibration-settings": calibration_settings,
    "routes": routes,
    "metrics": metric_table,
    "vllm-changes": vllm_changes,
}
