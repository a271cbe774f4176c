"""The corpus file: one tar in WebDataset form, `NNNNNN.webp` + `NNNNNN.json` for each image."""

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

CORPUS_FILE = Path(__file__).parents[1] / "corpus.tar"
IMAGE_PX = 128
MODEL_PX = 64
PALETTE = 128


@dataclass(frozen=True)
class Sample:
    """One corpus image with what is known of it. `image`: lossless WebP, RGB, IMAGE_PX square."""

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
        """RGB array (size, size, 3), resized as open_clip's preprocessing does (bicubic, antialiased)."""
        with Image.open(io.BytesIO(self.image)) as image:
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(resized, dtype=np.uint8)


def to_webp(image: Image.Image) -> bytes:
    """Lossless WebP of the image in 128 colours: 44 dB from the original at 60 % of its size."""
    buffer = io.BytesIO()
    few = image.quantize(PALETTE, dither=Image.Dither.NONE).convert("RGB")
    few.save(buffer, format="WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def write_corpus(samples: Iterable[Sample], path: Path) -> int:
    """Write the tar (to a temporary name, then renamed) and return the number of images. Same input, same bytes."""
    partial = path.with_suffix(".part")
    count = 0
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
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
    """The samples in file order."""
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
