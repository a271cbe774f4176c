"""Test files of mixed quality: most are valid; others are broken, duplicate, too large, empty or misnamed."""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("é", "with space", "100%", "a+b", "日本", "#1", "quo'te", "UPPER", "two.dots", "x" * 120)
FILES_PER_FOLDER = 500


@dataclass(frozen=True)
class GeneratedFile:
    """A file and its expected result: an outcome, or the code of a skipped file.

    duplicate: another file has the same bytes; of all files with the same bytes one is `created`.
    """

    name: str
    expected: str
    duplicate: bool = False


@dataclass(frozen=True)
class FileKind:
    """A kind of file. share: files per hundred. make: returns suffix and bytes."""

    expected: str
    share: int
    make: Callable[["FileMaker"], tuple[str, bytes]]
    duplicate: bool = False


class FileMaker:
    """Makes files with unique content from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._pixels = np.random.default_rng(seed)
        self.latest: list[tuple[str, bytes, Image.Image]] = []
        """The last 20 valid files, to make duplicates of: suffix, bytes, image."""

    def image(self) -> Image.Image:
        """Return soft shapes with a little noise, which compress like a photo."""
        width, height = self.random.choice([(320, 240), (240, 320), (400, 400), (512, 384)])
        coarse = Image.fromarray(self._pixels.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noise = self._pixels.integers(-6, 7, (height, width, 1), dtype=np.int16)
        return Image.fromarray(np.clip(soft + noise, 0, 255).astype(np.uint8))

    def good(self, kind: str) -> tuple[str, bytes]:
        image = self.image()
        made = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}[kind], encoded(image, kind)
        self.latest = [*self.latest[-19:], (*made, image)]
        return made

    def mislabelled(self) -> tuple[str, bytes]:
        return self.random.choice([".png", ".webp"]), encoded(self.image(), "JPEG")

    def same_bytes(self) -> tuple[str, bytes]:
        suffix, data, _ = self.random.choice(self.latest)
        return suffix, data

    def encoded_again(self) -> tuple[str, bytes]:
        # The random comment makes the bytes unique.
        image = self.random.choice(self.latest)[2]
        file = io.BytesIO()
        image.save(file, "JPEG", quality=self.random.randint(40, 80), comment=self.random.randbytes(8).hex())
        return ".jpeg", file.getvalue()

    def truncated(self) -> tuple[str, bytes]:
        data = encoded(self.image(), "PNG")
        return ".png", data[: len(data) // 2]

    def damaged(self) -> tuple[str, bytes]:
        data = bytearray(encoded(self.image(), "PNG"))
        data[len(data) // 2] ^= 0xFF  # the checksum of this chunk does not match any more
        return ".png", bytes(data)

    def text(self) -> tuple[str, bytes]:
        return self.random.choice([".jpg", ".png"]), f"not an image, {self.random.random()}".encode()

    def many_pixels(self) -> tuple[str, bytes]:
        """Return a small file that decodes to 100 megapixels."""
        side, rows = 10_000, self.random.randbytes(16)
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        return ".png", b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )

    def animated(self) -> tuple[str, bytes]:
        frames = [Image.new("RGB", (16, 16), (self.random.randrange(256), 0, shade)) for shade in (0, 255)]
        file = io.BytesIO()
        frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
        return ".webp", file.getvalue()


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


FILE_KINDS = (
    FileKind("created", 38, lambda maker: maker.good("JPEG")),
    FileKind("created", 18, lambda maker: maker.good("PNG")),
    FileKind("created", 12, lambda maker: maker.good("WEBP")),
    FileKind("created", 6, FileMaker.mislabelled),
    FileKind("created", 4, FileMaker.encoded_again),
    FileKind("duplicate", 5, FileMaker.same_bytes, duplicate=True),
    FileKind("invalid_image", 3, FileMaker.truncated),
    FileKind("invalid_image", 3, FileMaker.damaged),
    FileKind("unsupported_image_type", 3, FileMaker.text),
    FileKind("image_too_large", 3, FileMaker.many_pixels),
    FileKind("animated_image", 2, FileMaker.animated),
    FileKind("empty_file", 2, lambda _: (".jpg", b"")),
    FileKind("not_an_image", 1, lambda _: (".svg", b"<svg/>")),
)


def mixed_files(folder: Path, count: int, *, seed: int = 1) -> Iterator[GeneratedFile]:
    """Write `count` files of all kinds into subfolders. The same seed gives the same kinds in the same order."""
    maker = FileMaker(seed)
    kinds = [kind for kind in FILE_KINDS for _ in range(kind.share)]
    maker.random.shuffle(kinds)
    # Duplicates last, so that a valid file comes before the first of them.
    kinds.sort(key=lambda kind: kind.duplicate)
    kinds_in_order = [kinds[number % len(kinds)] for number in range(count)]
    for number, kind in enumerate(kinds_in_order):
        suffix, data = kind.make(maker)
        stem = f"{number:06}" + (f" {maker.random.choice(NAMES)}" if number % 10 == 0 else "")
        path = folder / f"{number // FILES_PER_FOLDER:03}" / (stem + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        yield GeneratedFile(path.relative_to(folder).as_posix(), kind.expected, kind.duplicate)


def good_files(folder: Path, count: int, *, seed: int = 2) -> None:
    """Write `count` different JPEG files."""
    maker = FileMaker(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:06}.jpg").write_bytes(maker.good("JPEG")[1])
