"""A captioned corpus in memory, with images decoded as the service decodes uploads."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from scripts.index_images.sources import Sample, read_samples
from shared.errors import BaseAppException, ConfigurationError
from shared.imaging import decode_upload, open_image
from shared.settings import APISettings

HELD_OUT = frozenset({"held-out", "held_out"})
"""Values of the attribute `split` for concepts that the generator was not trained on."""


@dataclass(frozen=True)
class CorpusImage:
    """One image as the service would store it, with its description."""

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
    images: list[CorpusImage]
    left_out: int
    """Number of files without a caption, refused by the service's decoder, or equal to another file."""

    @property
    def digest(self) -> str:
        """sha256 of contents and concepts in order, independent of the path of the corpus."""
        lines = (f"{image.sha256} {image.concept} {image.held_out}\n" for image in self.images)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def concepts(self, *, held_out: bool | None = None) -> list[str]:
        """Return the names of all concepts, or of one split, in order of first appearance."""
        names = (image.concept for image in self.images if held_out is None or image.held_out is held_out)
        return list(dict.fromkeys(names))


def read_corpus(path: Path, *, limits: APISettings, threads: int) -> Corpus:
    """Read a WebDataset tar, or a folder of images with NAME.json (description) or NAME.txt (caption).

    An image's concept is its attribute `concept`, else its caption; its split is its attribute `split`.

    Raises:
        ConfigurationError: the corpus has no image with a caption.
        SourceError: the tar, an image or a description cannot be read.
    """
    samples = list(read_samples(path))
    with ThreadPoolExecutor(threads) as decoders:
        decoded = decoders.map(lambda sample: _decode(sample, limits), samples)
        images = [image for image in decoded if image is not None]
    # Equal files are one image, as in a collection of the service.
    distinct = list({image.sha256: image for image in reversed(images)}.values())[::-1]
    if not distinct:
        raise ConfigurationError(f"{path} has no image with a caption.")
    return Corpus(distinct, left_out=len(samples) - len(distinct))


def _decode(sample: Sample, limits: APISettings) -> CorpusImage | None:
    attributes = sample.fields.get("attributes", {})
    caption = sample.fields.get("caption")
    concept = attributes.get("concept") or caption
    if not concept:
        return None
    try:
        image = decode_upload(sample.data, max_bytes=limits.max_upload_bytes, max_pixels=limits.max_upload_pixels)
    except BaseAppException:
        return None
    return CorpusImage(
        data=image.data,
        sha256=image.sha256,
        perceptual_hash=image.perceptual_hash,
        concept=concept,
        caption=caption,
        tags=tuple(sample.fields.get("tags", ())),
        held_out=attributes.get("split") in HELD_OUT,
    )


def choose_concepts(concepts: Iterable[str], count: int) -> list[str]:
    """Return `count` of the concepts, chosen by the digest of their names; a larger count only adds concepts."""
    return sorted(concepts, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]
