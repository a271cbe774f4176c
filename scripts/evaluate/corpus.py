"""A captioned corpus in memory, its images decoded as the service decodes uploads."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from scripts.index_images.sources import IMAGE_SUFFIXES, Sample, read_samples
from shared.errors import BaseAppException, ConfigurationError
from shared.imaging import decode_upload, open_image
from shared.settings import APISettings

HELD_OUT = frozenset({"held-out", "held_out"})
"""Values of the attribute `split` that say: the generator was not trained on this concept."""


@dataclass(frozen=True)
class Picture:
    """One image as the service would store it, and what is said of it."""

    data: bytes
    sha256: str
    perceptual_hash: int
    concept: str
    caption: str | None
    tags: tuple[str, ...]
    held_out: bool

    def open(self) -> Image.Image:
        return open_image(self.data)


@dataclass(frozen=True)
class Corpus:
    pictures: list[Picture]
    left_out: int
    """Files without a caption, that the service would refuse, or whose content is there already."""

    @property
    def digest(self) -> str:
        """sha256 of contents and concepts in order: equal corpora have equal digests wherever they lie."""
        lines = (f"{picture.sha256} {picture.concept} {picture.held_out}\n" for picture in self.pictures)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def concepts(self, *, held_out: bool | None = None) -> list[str]:
        """Names in order of first appearance; all, or those of one split."""
        wanted = (p.concept for p in self.pictures if held_out is None or p.held_out is held_out)
        return list(dict.fromkeys(wanted))


def read(path: Path, *, limits: APISettings, threads: int) -> Corpus:
    """Read a WebDataset tar, or a folder of images beside NAME.json (the same fields) or NAME.txt (the caption).

    An image's concept is its attribute `concept`, else its caption; its split is its attribute `split`.

    Raises:
        ConfigurationError: nothing in it is a captioned image.
    """
    samples = list(read_folder(path) if path.is_dir() else read_samples(path))
    with ThreadPoolExecutor(threads) as decoders:
        pictures = [p for p in decoders.map(lambda sample: _decoded(sample, limits), samples) if p is not None]
    # As in a collection of the service, equal files are one image.
    distinct = list({picture.sha256: picture for picture in reversed(pictures)}.values())[::-1]
    if not distinct:
        raise ConfigurationError(f"{path} holds no image with a caption.")
    return Corpus(distinct, left_out=len(samples) - len(distinct))


def read_folder(folder: Path) -> Iterator[Sample]:
    """The images below `folder` by path, with what lies beside them."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            yield Sample(path.relative_to(folder).as_posix(), path.read_bytes(), _beside(path))


def _beside(image: Path) -> dict[str, Any]:
    described, caption = image.with_suffix(".json"), image.with_suffix(".txt")
    if described.exists():
        fields: dict[str, Any] = json.loads(described.read_text(encoding="utf-8"))
        return fields
    return {"caption": caption.read_text(encoding="utf-8").strip()} if caption.exists() else {}


def _decoded(sample: Sample, limits: APISettings) -> Picture | None:
    attributes = sample.fields.get("attributes", {})
    caption = sample.fields.get("caption")
    concept = attributes.get("concept") or caption
    if not concept:
        return None
    try:
        image = decode_upload(sample.data, max_bytes=limits.max_upload_bytes, max_pixels=limits.max_upload_pixels)
    except BaseAppException:
        return None
    return Picture(
        data=image.data,
        sha256=image.sha256,
        perceptual_hash=image.perceptual_hash,
        concept=concept,
        caption=caption,
        tags=tuple(sample.fields.get("tags", ())),
        held_out=attributes.get("split") in HELD_OUT,
    )


def chosen(concepts: Iterable[str], count: int) -> list[str]:
    """`count` of the concepts, by digest of their names: a larger count adds to a smaller one's choice."""
    return sorted(concepts, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]
