"""Groups of settings: pydantic models that refuse a value in a sentence of ours, by its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_wsi.errors import SettingsError

SHOWN_CHARS = 80

# By pydantic's type of error; the braces are filled from the error's context.
WANTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "a mapping",
    "model_type": "a mapping",
    "multiple_of": "a multiple of {multiple_of:g}",
    "path_type": "a path",
    "string_type": "text",
    "too_short": "at least {min_length}",
    "tuple_type": "a list",
}


class Settings(BaseModel):
    """Base of all groups of settings. Unknown keys, NaN and infinity are refused.

    Raises:
        SettingsError: one sentence for each key that does not fit.
    """

    # What stands below a field is its description, which the reference of the settings is made of.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError("\n".join(refusals(error))) from None

    # pydantic calls an `__init__` with this mark for the outermost model alone: what is wrong in a model within it is
    # told with its whole key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def of(cls, values: Any, where: str) -> Self:
        """The settings that a file holds.

        Args:
            values: what was read, of whatever type.
            where: the file, which each sentence begins with.

        Raises:
            SettingsError: one sentence for each key that does not fit.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError("\n".join(f"{where}: {sentence}" for sentence in refusals(error))) from None

    def changed(self, **values: Any) -> Self:
        """A copy with other values, which are checked as the first ones were (`model_copy` checks nothing)."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | values)


def refusals(error: ValidationError) -> list[str]:
    """«key: found X, wanted Y» for each value that does not fit."""
    return [_refusal(one) for one in error.errors(include_url=False)]


def _refusal(error: Mapping[str, Any]) -> str:
    key = "".join(f"{part}: " for part in [".".join(map(str, error["loc"]))] if part)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return f"{key}{context['error']}"
    if kind == "missing":
        return f"{key}found none, wanted one"
    found = repr(error["input"])
    if len(found) > SHOWN_CHARS:
        found = f"{found[:SHOWN_CHARS]} .."
    if kind == "extra_forbidden":
        return f"{key}found {found}, wanted no key of this name"
    wanted = WANTED[kind].format(**context) if kind in WANTED else error["msg"].removeprefix("Input should be ")
    return f"{key}found {found}, wanted {wanted}"
