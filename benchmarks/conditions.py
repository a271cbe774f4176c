"""The conditions of a measurement, and reports that contain them."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("flask", "granian", "celery", "redis", "sqlalchemy", "psycopg2-binary", "torch")
RESULTS_FOLDER = Path("out/bench")


def conditions() -> dict[str, str]:
    """Return processor, cores, load and versions at the time of the call."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load average": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def report(title: str, figures: dict[str, object], **measured_with: object) -> None:
    """Print a benchmark's conditions and figures."""
    print(f"# {title}")
    for name, value in {**conditions(), **measured_with}.items():
        print(f"  {name}: {value}")
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name:<{width}}  {value}")


def save(name: str, figures: dict[str, object], **measured_with: object) -> Path:
    """Write figures with their conditions to `out/bench/NAME.json`."""
    path = RESULTS_FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"conditions": {**conditions(), **measured_with}, "figures": figures}
    path.write_text(json.dumps(whole, indent=2, default=str) + "\n", encoding="utf-8")
    return path
