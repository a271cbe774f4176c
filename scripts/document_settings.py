"""Write docs/settings.md: every setting, from the settings themselves (`make docs`)."""

import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from shared.settings import (
    STARTER,
    ConceptSettings,
    GeneratorSettings,
    IPAdapterSettings,
    LoraSettings,
    OutputRule,
    PromptRule,
    Settings,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
INTRODUCTION = """\
# Settings

Written by `make docs` from `shared/settings.py`; a test keeps it current.

Values come, strongest first, from the environment, `.env.<environment>`, `.env`, and the TOML file named by
`AFTERIMAGE_CONFIG_FILE` (default `afterimage.toml`). In TOML, `AFTERIMAGE_DATABASE__POOL_SIZE` is `pool_size` below
`[database]`. A wrong or misspelt setting stops the start with one line per mistake.
"""


def page() -> str:
    """The whole text of docs/settings.md."""
    parts = [INTRODUCTION]
    top = [(name, field) for name, field in Settings.model_fields.items() if _section(field) is None]
    parts.append(_table("General", [(f"AFTERIMAGE_{name.upper()}", field) for name, field in top]))
    for name, field in Settings.model_fields.items():
        section = _section(field)
        if section is not None:
            parts.append(_table(f"`[{name}]`", list(_variables(section, f"AFTERIMAGE_{name.upper()}__"))))
    for title, variable, model in (
        ("`[model.generators.NAME]`", "MODEL__GENERATORS", GeneratorSettings),
        ("`[model.generators.NAME.ip_adapter]`", "MODEL__GENERATORS", IPAdapterSettings),
        ("`[model.generators.NAME.loras.NAME]`", "MODEL__GENERATORS", LoraSettings),
        ("`[[safety.concepts]]`", "SAFETY__CONCEPTS", ConceptSettings),
        ("`[safety.concepts.prompt]`", "SAFETY__CONCEPTS", PromptRule),
        ("`[safety.concepts.output]`", "SAFETY__CONCEPTS", OutputRule),
    ):
        title = f"{title} (TOML, or JSON in `AFTERIMAGE_{variable}`)"
        parts.append(_table(title, list(_variables(model, ""))))
    return "\n".join(parts)


def _variables(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        section = _section(field)
        if section is None:
            yield f"{prefix}{name.upper() if prefix else name}", field
        elif prefix:
            yield from _variables(section, f"{prefix}{name.upper()}__")
        else:
            yield from ((f"{name}.{inner}", inner_field) for inner, inner_field in _variables(section, ""))


def _section(field: FieldInfo) -> type[BaseModel] | None:
    return field.annotation if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) else None


def _table(title: str, variables: list[tuple[str, FieldInfo]]) -> str:
    rows = [
        f"| `{name}` | {_default(field)} | {_allowed(field)} | {field.description or ''} |" for name, field in variables
    ]
    return "\n".join(
        [f"## {title}", "", "| name | default | allowed | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value is PydanticUndefined or value in ("", {}, []):
        return ""
    if isinstance(value, dict | list):
        return ", ".join(f"`{key}`" for key in value)
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, Enum):
        value = value.value
    # Not the folder of the clone in which the page was written.
    return f"`{value}`".replace(f"{STARTER.parent}/", "")


def _allowed(field: FieldInfo) -> str:
    bounds = []
    for constraint in field.metadata:
        match constraint:
            case annotated_types.Ge(ge=bound):
                bounds.append(f"≥ {bound}")
            case annotated_types.Gt(gt=bound):
                bounds.append(f"> {bound}")
            case annotated_types.Le(le=bound):
                bounds.append(f"≤ {bound}")
            case annotated_types.Lt(lt=bound):
                bounds.append(f"< {bound}")
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments if argument is not type(None))
    if origin is dict:
        return "table"
    if origin is list:
        return "list"
    if isinstance(annotation, type):
        if issubclass(annotation, Enum):
            return " or ".join(f"`{member.value}`" for member in annotation)
        if issubclass(annotation, BaseModel):
            return "table"
        return {str: "text", SecretStr: "text", int: "integer", float: "number", bool: "true or false"}[annotation]
    raise TypeError(f"no word for {annotation}")


if __name__ == "__main__":
    PAGE.write_text(page())
