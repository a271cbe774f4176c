"""Merges the description of an image's file with the changes that people made to the image.

The service applies changes of the file since it was last read, and keeps values that people have set or removed.
"""

from collections.abc import Mapping
from typing import Any

import pydantic

from api_service.http import problems
from shared.contracts.images import ImageDescription

SCALARS = ("caption", "licence", "source")


def merge(current: Mapping[str, Any], before: Mapping[str, Any] | None, now: ImageDescription) -> ImageDescription:
    """Apply the difference between the file's descriptions `before` and `now` to the `current` one.

    before: None if it is not known; then the file only adds.

    Raises:
        ValidationError: the result has too many tags or attributes.
    """
    old = before or {}
    tags_before = old.get("tags", [])
    removed = set(tags_before) - set(now.tags)
    added = [tag for tag in now.tags if tag not in tags_before]
    kept = [tag for tag in current["tags"] if tag not in removed]
    merged = {name: _merge_value(current[name], old.get(name), getattr(now, name)) for name in SCALARS}
    try:
        return ImageDescription(
            **merged,
            tags=list(dict.fromkeys([*kept, *added])),
            attributes=_merge_attributes(current["attributes"], old.get("attributes", {}), now.attributes),
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(["body.file_description", *map(str, first["loc"])])
        raise problems.field_error(field, first["type"], f"With what people added: {first['msg']}") from None


def _merge_value(current: str | None, before: str | None, now: str | None) -> str | None:
    """The file's value, unless a person has set or removed the value since."""
    return now if current == before else current


def _merge_attributes(current: Mapping[str, str], before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    names = dict.fromkeys([*current, *now])
    merged = {name: _merge_value(current.get(name), before.get(name), now.get(name)) for name in names}
    return {name: value for name, value in merged.items() if value is not None}
