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
    AdvancedMarker,
    ConceptSettings,
    EngineSettings,
    FormerName,
    GeneratorSettings,
    IPAdapterSettings,
    LoraSettings,
    OutputRule,
    PromptRule,
    QuantizationSettings,
    Settings,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
INTRODUCTION = """\
# Settings

`make docs` writes this page from `shared/settings/`, and a test keeps it current. [Common](#common) lists the
settings that an operator may need on day one. [Advanced](#advanced) lists the others; their defaults rarely need a
change.

## How to set one

- **Environment:** `AFTERIMAGE_<SECTION>__<NAME>`, for example `AFTERIMAGE_DATABASE__POOL_SIZE=16`. Two underscores
  separate the levels. A table or a list is written as JSON.
- **Dotenv files:** `.env` and `.env.<environment>` hold the same names. `AFTERIMAGE_ENVIRONMENT` names the environment.
- **TOML file:** `afterimage.toml`, or the file that `AFTERIMAGE_CONFIG_FILE` names. The example above is
  `pool_size = 16` below `[database]`.
- **Files of secrets:** `AFTERIMAGE_SECRETS_DIR` names a folder, such as `/run/secrets`. A file in it has the name of a
  variable, such as `afterimage_database__url`. Its content is the value.
- **Order:** the environment wins over `.env.<environment>`, then `.env`, then files of secrets, then the TOML file,
  then the default.
- **Secrets:** write passwords and storage keys into files of secrets, the environment or `.env`. Percent-encode
  `/` and `@` in the password of a URL. Logs and error messages show no secret.
- **Mistakes:** a wrong value or an unknown name stops the start, with one line per mistake.
- **Renamed settings:** one release also reads the old name and logs a warning. Setting both names is a mistake.

An empty default means that the setting is unset, or an empty list or table.
"""
GENERATORS = "(TOML, or JSON in `AFTERIMAGE_MODEL__GENERATORS`)"
CONCEPTS = "(TOML, or JSON in `AFTERIMAGE_SAFETY__CONCEPTS`)"

KINDS: dict[Any, str] = {
    str: "text",
    SecretStr: "text",
    Path: "path",
    int: "integer",
    float: "number",
    bool: "true or false",
}

Variables = list[tuple[str, FieldInfo]]


def page() -> str:
    """The whole text of docs/settings.md."""
    common, advanced = tables(advanced=False), tables(advanced=True)
    return "\n".join([INTRODUCTION, "## Common\n", *common, "## Advanced\n", *advanced])


def tables(*, advanced: bool) -> Iterator[str]:
    """The tables of one part, each with its heading; a group without such settings has none."""
    for title, variables in groups():
        chosen = [(name, field) for name, field in variables if is_advanced(field) == advanced]
        if chosen:
            yield _table(title, chosen)


def groups() -> Iterator[tuple[str, Variables]]:
    """Every setting of the product, by the title of its table."""
    top = [(name, field) for name, field in Settings.model_fields.items() if _section(field) is None]
    yield "General", [(f"AFTERIMAGE_{name.upper()}", field) for name, field in top]
    for name, field in Settings.model_fields.items():
        section = _section(field)
        if section is not None:
            yield f"`[{name}]`", list(_variables(section, f"AFTERIMAGE_{name.upper()}__"))
    for title, model in (
        (f"`[model.generators.NAME]` {GENERATORS}", GeneratorSettings),
        (f"`[model.generators.NAME.engine]` {GENERATORS}", EngineSettings),
        (f"`[model.generators.NAME.quantization]` {GENERATORS}", QuantizationSettings),
        (f"`[model.generators.NAME.ip_adapter]` {GENERATORS}", IPAdapterSettings),
        (f"`[model.generators.NAME.loras.NAME]` {GENERATORS}", LoraSettings),
        (f"`[[safety.concepts]]` {CONCEPTS}", ConceptSettings),
        (f"`[safety.concepts.prompt]` {CONCEPTS}", PromptRule),
        (f"`[safety.concepts.output]` {CONCEPTS}", OutputRule),
    ):
        yield title, list(_variables(model, ""))


def is_advanced(field: FieldInfo) -> bool:
    return any(isinstance(marker, AdvancedMarker) for marker in field.metadata)


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


def _table(title: str, variables: Variables) -> str:
    rows = [f"| `{name}` | {_default(field)} | {_allowed(field)} | {_meaning(field)} |" for name, field in variables]
    return "\n".join(
        [f"### {title}", "", "| name | default | allowed | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    )


def _meaning(field: FieldInfo) -> str:
    former = [
        f"; formerly `AFTERIMAGE_{marker.section.upper()}__{marker.name.upper()}`"
        for marker in field.metadata
        if isinstance(marker, FormerName)
    ]
    return "".join([field.description or "", *former])


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
    if isinstance(value, bool):
        value = str(value).lower()
    # The page must not depend on the folder of the clone.
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
        return KINDS[annotation]
    raise TypeError(f"no word for {annotation}")


if __name__ == "__main__":
    PAGE.write_text(page())
