"""The settings of a generator as TOML, to copy into `afterimage.toml`."""

import json
from collections.abc import Mapping
from typing import Any

from scripts.try_model.trial import Trial


def found_settings(trial: Trial, *, max_batch_size: int | None) -> dict[str, Any]:
    """The generator's settings, with its defaults and the batch size that were found.

    max_batch_size: None leaves the one of the settings.
    """
    found = {
        "max_references": trial.capabilities.max_references,
        "defaults": trial.model.defaults.model_dump(mode="json", exclude_none=True),
    }
    if trial.settings.engine is None:  # an engine has a device and batches of its own
        found |= {
            "device": trial.capabilities.device,
            "dtype": trial.capabilities.dtype.partition(",")[0],  # without the quantization
            "max_batch_size": max_batch_size or trial.settings.max_batch_size,
        }
    secrets = {"engine": {"api_key"}}
    return trial.settings.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude=secrets) | found


def as_toml(settings: Mapping[str, Any], path: str) -> str:
    """A TOML table with its subtables. path: the table's dotted name."""
    values = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    tables = {name: value for name, value in settings.items() if isinstance(value, Mapping) and value}
    lines = [f"[{path}]"] if values else []
    # JSON writes texts, numbers, booleans and lists of them as TOML does.
    lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    own = ["\n".join(lines)] if lines else []
    return "\n\n".join([*own, *(as_toml(table, f"{path}.{name}") for name, table in tables.items())])
