"""Split a lock file for an image without the libraries of NVIDIA.

    python ops/docker/cpu_lock.py worker.lock hashed.lock torch.txt

`hashed.lock` has all packages that run on any processor. `torch.txt` has torch and torchvision, in the same versions.
The index of torch for CPUs has other files for them, which need no package of NVIDIA. It uses only the standard
library, because it runs in an empty environment.
"""

import re
import sys
from pathlib import Path

FROM_CPU_INDEX = {"torch", "torchvision"}
FOR_GPUS = re.compile(r"nvidia-.*|cuda-.*|triton")


def split(lock: str) -> tuple[str, str]:
    """The entries that stay as they are, and the names with versions of those that come from the index for CPUs."""
    kept, from_index = [], []
    for entry in re.findall(r"^\S.*(?:\n[ \t].*)*", lock, re.MULTILINE):
        name, _, rest = entry.partition("==")
        if name in FROM_CPU_INDEX:
            from_index.append(f"{name}=={rest.split()[0]}")
        elif not FOR_GPUS.fullmatch(name):
            kept.append(entry)
    return "\n".join(kept) + "\n", "\n".join(from_index) + "\n"


def main(lock: Path, hashed: Path, from_index: Path) -> None:
    texts = split(lock.read_text())
    hashed.write_text(texts[0])
    from_index.write_text(texts[1])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
