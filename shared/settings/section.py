"""The base of every group of settings: unknown names are errors, and former names are still read."""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

Value = TypeVar("Value")


class AdvancedMarker:
    """Marks a field that no operator needs on day one. docs/settings.md lists these apart from the common ones."""


ADVANCED = AdvancedMarker()
Advanced = Annotated[Value, ADVANCED]


@dataclass(frozen=True)
class FormerName:
    """The name of a setting in the previous release. This release still reads it and logs a warning."""

    section: str
    name: str


logger = logging.getLogger(__name__)


class Section(BaseModel):
    """A group of settings. An unknown name in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _former_names_are_read(cls, values: Any) -> Any:
        """Move values from former names to the current ones; a value under both names is an error."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name, field in cls.model_fields.items():
            for former in (marker for marker in field.metadata if isinstance(marker, FormerName)):
                if former.name in values:
                    old, new = f"{former.section}.{former.name}", f"{former.section}.{name}"
                    if name in values:
                        raise ValueError(f"{old} is the former name of {new}: set only {new}")
                    values[name] = values.pop(former.name)
                    warn_of_former(old, new)
        return values


@cache
def warn_of_former(former: str, current: str) -> None:
    """Log once per process. The line must be complete without fields, because logging is not configured yet."""
    logger.warning("setting_renamed: %s is now %s; the next release does not read the old name", former, current)
