"""Replace folders as a whole."""

import shutil
from pathlib import Path


def replace_folder(new: Path, target: Path) -> None:
    """Replace the folder `target` by `new` with renames, so that it is never half-written."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
