"""A folder as people have them: most files good, some broken, double, huge, empty or not what their name says."""

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
A_DIRECTORY = 500


@dataclass(frozen=True)
class Made:
    """A file and what must be said of it: an outcome, or the code of a skipped one.

    `double`: its bytes are those of another file; of all with the same bytes one is `created`.
    """

    name: str
    expected: str
    double: bool = False


@dataclass(frozen=True)
class Sort:
    """A kind of file. share: of a hundred. make: its suffix and bytes."""

    expected: str
    share: int
    make: Callable[["Maker"], tuple[str, bytes]]
    double: bool = False


class Maker:
    """Draws files that no other draw gives, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._pixels = np.random.default_rng(seed)
        self.latest: list[tuple[str, bytes, Image.Image]] = []
        """Good files to make doubles of, as suffix, bytes, picture."""

    def picture(self) -> Image.Image:
        """Soft shapes under a little noise: compresses like a photo."""
        width, height = self.random.choice([(320, 240), (240, 320), (400, 400), (512, 384)])
        coarse = Image.fromarray(self._pixels.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noise = self._pixels.integers(-6, 7, (height, width, 1), dtype=np.int16)
        return Image.fromarray(np.clip(soft + noise, 0, 255).astype(np.uint8))

    def good(self, kind: str) -> tuple[str, bytes]:
        picture = self.picture()
        made = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}[kind], encoded(picture, kind)
        self.latest = [*self.latest[-19:], (*made, picture)]
        return made

    def mislabelled(self) -> tuple[str, bytes]:
        return self.random.choice([".png", ".webp"]), encoded(self.picture(), "JPEG")

    def same_bytes(self) -> tuple[str, bytes]:
        suffix, data, _ = self.random.choice(self.latest)
        return suffix, data

    def encoded_again(self) -> tuple[str, bytes]:
        # A quality of its own, so that it is no file that was written before.
        picture = self.random.choice(self.latest)[2]
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=self.random.randint(40, 80), comment=self.random.randbytes(8).hex())
        return ".jpeg", file.getvalue()

    def truncated(self) -> tuple[str, bytes]:
        data = encoded(self.picture(), "PNG")
        return ".png", data[: len(data) // 2]

    def damaged(self) -> tuple[str, bytes]:
        data = bytearray(encoded(self.picture(), "PNG"))
        data[len(data) // 2] ^= 0xFF  # its chunk's checksum is wrong from here on
        return ".png", bytes(data)

    def text(self) -> tuple[str, bytes]:
        return self.random.choice([".jpg", ".png"]), f"no image at all, {self.random.random()}".encode()

    def many_pixels(self) -> tuple[str, bytes]:
        """A small file that would be 100 megapixels."""
        side, rows = 10_000, self.random.randbytes(16)
        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        return ".png", b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )

    def moving(self) -> tuple[str, bytes]:
        frames = [Image.new("RGB", (16, 16), (self.random.randrange(256), 0, shade)) for shade in (0, 255)]
        file = io.BytesIO()
        frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
        return ".webp", file.getvalue()


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


SORTS = (
    Sort("created", 38, lambda maker: maker.good("JPEG")),
    Sort("created", 18, lambda maker: maker.good("PNG")),
    Sort("created", 12, lambda maker: maker.good("WEBP")),
    Sort("created", 6, Maker.mislabelled),
    Sort("created", 4, Maker.encoded_again),
    Sort("duplicate", 5, Maker.same_bytes, double=True),
    Sort("invalid_image", 3, Maker.truncated),
    Sort("invalid_image", 3, Maker.damaged),
    Sort("unsupported_image_type", 3, Maker.text),
    Sort("image_too_large", 3, Maker.many_pixels),
    Sort("animated_image", 2, Maker.moving),
    Sort("empty_file", 2, lambda _: (".jpg", b"")),
    Sort("not_an_image", 1, lambda _: (".svg", b"<svg/>")),
)


def mixed_files(folder: Path, count: int, *, seed: int = 1) -> Iterator[Made]:
    """Write that many files, in folders, in shares that are the same every time."""
    maker = Maker(seed)
    sorts = [sort for sort in SORTS for _ in range(sort.share)]
    maker.random.shuffle(sorts)
    # A file before the first double.
    sorts.sort(key=lambda sort: sort.double)
    turns = [sorts[number % len(sorts)] for number in range(count)]
    for number, sort in enumerate(turns):
        suffix, data = sort.make(maker)
        stem = f"{number:06}" + (f" {maker.random.choice(NAMES)}" if number % 10 == 0 else "")
        path = folder / f"{number // A_DIRECTORY:03}" / (stem + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        yield Made(path.relative_to(folder).as_posix(), sort.expected, sort.double)


def good_files(folder: Path, count: int, *, seed: int = 2) -> None:
    """Only JPEGs, all different."""
    maker = Maker(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:06}.jpg").write_bytes(maker.good("JPEG")[1])
