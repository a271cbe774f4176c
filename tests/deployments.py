"""Checks of files that start the product's processes: the settings and modules that they name exist."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel

from shared.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
VARIABLES_BESIDE_SETTINGS = {"AFTERIMAGE_CONFIG_FILE", "AFTERIMAGE_SECRETS_DIR"}


def setting_variables(model: type[BaseModel] = Settings, prefix: str = "AFTERIMAGE_") -> Iterator[str]:
    """The environment variable of each setting and each section."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}".upper()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_variables(field.annotation, f"{prefix}{name}__".upper())


def assert_starts_a_module(command: Sequence[str]) -> None:
    """Assert that `python -m ...` names a module of this repository that can be started, or Celery with its app."""
    assert command[:2] == ["python", "-m"]
    module = command[2]
    package = importlib.util.find_spec(module)
    assert package is not None
    if module == "celery":
        assert importlib.util.find_spec(command[command.index("-A") + 1]) is not None
    elif module != "alembic":
        main = importlib.util.find_spec(f"{module}.__main__") if package.submodule_search_locations else package
        assert main is not None
        assert main.origin is not None
        assert '__name__ == "__main__"' in Path(main.origin).read_text()
