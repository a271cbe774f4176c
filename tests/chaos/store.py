"""A blob store that can become full: a small file system of its own where this user may mount one."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SIZE_MB = 96


@dataclass(frozen=True)
class Store:
    folder: Path
    is_small: bool

    @contextmanager
    def full(self) -> Iterator[None]:
        """Make every write of an output fail until the block ends.

        The file system is full. Without a file system of its own, a file replaces the folder of outputs, which stops
        root as well.
        """
        if self.is_small:
            filler = self.folder / "filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            try:
                yield
            finally:
                filler.unlink()
            return
        outputs, aside = self.folder / "outputs", self.folder / "aside"
        outputs.mkdir(exist_ok=True)
        outputs.rename(aside)
        outputs.touch()
        try:
            yield
        finally:
            outputs.unlink()
            aside.rename(outputs)


@contextmanager
def small_store(folder: Path) -> Iterator[Store]:
    """Mount a file system of `SIZE_MB` megabytes of memory on a new folder until the block ends."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m,mode=700", "chaos", str(folder)]
    is_small = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield Store(folder, is_small)
    finally:
        if is_small:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
