"""The corpus file: a compressed WebDataset tar with `NNNNNN.webp` and `NNNNNN.json` for each image."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

CORPUS_FILE = Path(__file__).parents[1] / "corpus.tar.gz"
IMAGE_PX = 128
MODEL_PX = 64
PALETTE = 128


@dataclass(frozen=True)
class Sample:
    """One corpus image with its description. image: lossless WebP, RGB, IMAGE_PX square."""

    image: bytes
    caption: str
    tags: tuple[str, ...]
    licence: str
    source: str
    attributes: dict[str, str]

    @property
    def concept(self) -> str:
        return self.attributes["concept"]

    @property
    def is_held_out(self) -> bool:
        return self.attributes["split"] == "held-out"

    def pixels(self, size: int) -> npt.NDArray[np.uint8]:
        """Return an RGB array (size, size, 3), resized as in open_clip's preprocessing (bicubic, antialiased)."""
        with Image.open(io.BytesIO(self.image)) as image:
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(resized, dtype=np.uint8)


def to_webp(image: Image.Image) -> bytes:
    """Return a lossless WebP of the image in 128 colours: PSNR 44 dB, 60 % of the size with all colours."""
    buffer = io.BytesIO()
    reduced = image.quantize(PALETTE, dither=Image.Dither.NONE).convert("RGB")
    reduced.save(buffer, format="WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def write_corpus(samples: Iterable[Sample], path: Path) -> int:
    """Write the tar atomically and return the number of images. The same input gives the same bytes."""
    partial = path.with_suffix(".part")
    count = 0
    with (
        gzip.GzipFile(partial, "wb", mtime=0) as compressed,  # without the time, the same input gives the same bytes
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for count, sample in enumerate(samples, start=1):
            record = {
                "caption": sample.caption,
                "tags": list(sample.tags),
                "licence": sample.licence,
                "source": sample.source,
                "attributes": sample.attributes,
            }
            _add(archive, f"{count - 1:06d}.webp", sample.image)
            _add(archive, f"{count - 1:06d}.json", json.dumps(record, ensure_ascii=False).encode())
    partial.replace(path)
    return count


def read_corpus(path: Path = CORPUS_FILE) -> Iterator[Sample]:
    """Yield the samples in file order.

    Raises:
        ValueError: a member is not a file, or an image lacks its JSON.
    """
    with tarfile.open(path) as archive:
        pending: dict[str, dict[str, bytes]] = {}
        for member in archive:
            stem, _, extension = member.name.partition(".")
            parts = pending.setdefault(stem, {})
            file = archive.extractfile(member)
            if file is None:
                raise ValueError(f"{path}: {member.name} is not a file")
            parts[extension] = file.read()
            if {"webp", "json"} <= parts.keys():
                record: dict[str, Any] = json.loads(parts["json"])
                record["tags"] = tuple(record["tags"])
                yield Sample(image=parts["webp"], **record)
                del pending[stem]
    if pending:
        raise ValueError(f"{path}: incomplete samples {sorted(pending)[:5]}")


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    archive.addfile(info, io.BytesIO(content))
