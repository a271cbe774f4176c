"""Reads the structure of image files without decoding them. Pillow does not offer these facts."""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.errors import InvalidImageError

MAX_CHUNKS = 50_000
"""Chunks or segments of one file. Pillow reads each in Python, so millions of empty ones take a minute."""
MAX_PROFILE_BYTES = 8 * 2**20
"""Bytes of the ICC profile of a PNG. Profiles of RGB with tables have up to about 4 MB."""
MAX_SCANS = 100
"""Scans of one JPEG. Each one decodes every pixel again. Encoders write about 10."""

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
PNG_COLOURS = (b"cHRM", b"cICP", b"gAMA", b"iCCP", b"sRGB", b"tRNS")
"""Chunks that count only before the pixels: https://www.w3.org/TR/png-3/#5ChunkOrdering."""
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples of a pixel by colour type."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row and their steps, by pass: https://www.w3.org/TR/png-3/#8Interlace."""
JPEG_END = b"\xff\xd9"
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff])")
JPEG_MARKER_AFTER_SCAN = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9


@dataclass
class Png:
    """The chunks of a PNG.

    chunks: the body of the first chunk of each name, without `IDAT`. One of `PNG_COLOURS` after `IDAT` does not count.
    """

    chunks: dict[bytes, bytes] = field(default_factory=dict)
    end: int = 0
    """Where the last whole chunk ends."""
    pixels: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of the body of each `IDAT` in the first row of them."""
    unread: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of each chunk that Pillow must not read: texts, profiles, and colours that do not count."""

    @property
    def depth(self) -> int:
        return self.chunks[b"IHDR"][8]

    @property
    def is_grey(self) -> bool:
        return self.chunks[b"IHDR"][9] == 0

    @property
    def is_grey_alpha(self) -> bool:
        return self.chunks[b"IHDR"][9] == 4

    @property
    def is_rgb(self) -> bool:
        return self.chunks[b"IHDR"][9] == 2


def read_png(data: bytes) -> Png:
    """Read the chunks of a PNG up to its end or to the first damaged chunk.

    Raises:
        InvalidImageError: it has too many chunks, or does not begin with its header.
    """
    png, before = Png(end=8), b""
    for _ in range(MAX_CHUNKS):
        start = png.end
        size = int.from_bytes(data[start : start + 4], "big")
        name, end = data[start + 4 : start + 8], start + 12 + size
        if end > len(data) or b"IEND" in png.chunks:
            if len(png.chunks.get(b"IHDR", b"")) != 13:
                raise InvalidImageError("The image is damaged or incomplete.")
            return png
        counts = name not in PNG_COLOURS or not png.pixels
        if name == b"IDAT":
            if before == b"IDAT" or not png.pixels:
                png.pixels.append((start + 8, end - 4))
        elif counts:
            png.chunks.setdefault(name, data[start + 8 : end - 4])
        if name in (*PNG_TEXTS, b"iCCP") or not counts:
            png.unread.append((start, end))
        png.end, before = end, name
    raise InvalidImageError(f"The PNG has more than {MAX_CHUNKS} chunks.")


def readable_png(data: bytes, png: Png) -> bytes:
    """The file with its end chunk, and without the chunks that Pillow must not read.

    Browsers show a PNG without its end, because no pixel is missing. They ignore a damaged or long text.
    """
    starts = [0, *(end for _, end in png.unread)]
    ends = [*(start for start, _ in png.unread), png.end]
    tail = data[png.end :]
    missing = b"IEND" not in png.chunks and PNG_END.startswith(tail)
    return b"".join(data[start:end] for start, end in zip(starts, ends, strict=True)) + (PNG_END if missing else tail)


def has_all_rows(data: bytes, png: Png) -> bool:
    """Whether the pixel data of a PNG has as many bytes as its header needs. Pillow leaves missing rows black."""
    missing = _bytes_of_rows(png.chunks[b"IHDR"])
    inflate = zlib.decompressobj()
    try:
        for start, end in png.pixels:
            for offset in range(start, end, 2**16):
                compressed = data[offset : min(offset + 2**16, end)]
                while compressed and missing > 0:
                    missing -= len(inflate.decompress(compressed, 2**18))
                    compressed = inflate.unconsumed_tail
        return missing <= len(inflate.flush()) if missing > 0 else True
    except zlib.error:
        return False


def _bytes_of_rows(header: bytes) -> int:
    """Bytes of the filtered rows: one for the filter, and the pixels in whole bytes."""
    width, height, depth, kind, _, _, interlace = struct.unpack(">IIBBBBB", header)
    size = 0
    for x, y, step_x, step_y in ADAM7 if interlace else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0:
            size += max(rows, 0) * (1 + -(-columns * depth * PNG_SAMPLES[kind] // 8))
    return size


def png_profile(png: Png) -> bytes | None:
    """The ICC profile of a PNG; None without one, and for one that is damaged or larger than `MAX_PROFILE_BYTES`."""
    compressed = png.chunks.get(b"iCCP", b"").partition(b"\0")[2]
    if not compressed.startswith(b"\0"):  # the only method of compression
        return None
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(compressed[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if inflate.eof else None


def png_key(png: Png) -> tuple[int, ...] | None:
    """The samples of the colour that is transparent, for a grey or RGB file. Bits over the depth are ignored."""
    samples = 1 if png.is_grey else 3
    body = png.chunks.get(b"tRNS", b"")
    if not (png.is_grey or png.is_rgb) or len(body) < 2 * samples:
        return None
    mask = 2**png.depth - 1
    return tuple(value & mask for value in struct.unpack_from(f">{samples}H", body))


@dataclass
class Jpeg:
    """The scans of a JPEG's first picture."""

    scans: int = 0
    has_end: bool = False
    is_arithmetic: bool = False
    """Whether the data is coded arithmetically, and not with Huffman codes."""
    entropy_end: int = 0
    """Where the data of the last scan ends."""
    entropy_start: int = 0
    open_coefficients: set[tuple[int, int]] = field(default_factory=set)
    """Component and coefficient that no scan has brought to its last bit."""


def read_jpeg(data: bytes) -> Jpeg:
    """Read the markers of a JPEG up to its end, or to the first damaged one.

    Raises:
        InvalidImageError: it has more than `MAX_SCANS` scans, or too many segments.
    """
    jpeg = Jpeg()
    for count, (code, offset) in enumerate(_jpeg_segments(data, jpeg)):
        body = data[offset + 2 :] if code == START_OF_SCAN and len(data) < 64 else data[offset + 2 : offset + 64]
        if count == MAX_CHUNKS:
            raise InvalidImageError(f"The JPEG has more than {MAX_CHUNKS} segments.")
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC) and len(body) > 5:
            jpeg.is_arithmetic = code > 0xC8
            components = body[6 : 6 + 3 * body[5] : 3]
            jpeg.open_coefficients = {(each, number) for each in components for number in range(64)}
        elif code == START_OF_SCAN and body:
            jpeg.scans += 1
            if jpeg.scans > MAX_SCANS:
                raise InvalidImageError(f"The JPEG has more than {MAX_SCANS} scans.")
            parameters = body[1 + 2 * body[0] : 4 + 2 * body[0]]
            if len(parameters) == 3 and parameters[2] & 15 == 0:
                finished = range(parameters[0], parameters[1] + 1)
                jpeg.open_coefficients -= {(each, n) for each in body[1 : 1 + 2 * body[0] : 2] for n in finished}
    return jpeg


def _jpeg_segments(data: bytes, jpeg: Jpeg) -> Iterator[tuple[int, int]]:
    offset, pattern = 2, JPEG_MARKER
    while found := pattern.search(data, offset):
        code, offset = found[1][0], found.end()
        if pattern is JPEG_MARKER_AFTER_SCAN:
            jpeg.entropy_end = found.start()
        if code == END_OF_IMAGE:
            jpeg.has_end = True
            return
        pattern = JPEG_MARKER
        if code in (0x01, *range(0xD0, 0xD9)):
            continue
        yield code, offset
        offset += int.from_bytes(data[offset : offset + 2], "big")
        if code == START_OF_SCAN:
            pattern = JPEG_MARKER_AFTER_SCAN
            jpeg.entropy_start, jpeg.entropy_end = offset, len(data)


def next_restart_marker(data: bytes, jpeg: Jpeg) -> bytes:
    """The restart marker that would come after the data of the last scan."""
    found = RESTART.findall(data, jpeg.entropy_start, jpeg.entropy_end)
    return bytes([0xFF, 0xD0 + (found[-1][0] + 1) % 8 if found else 0xD0])


def is_lossless_webp(data: bytes) -> bool:
    """Whether the picture of a WebP, or of its first frame, is in a `VP8L` chunk.

    https://developers.google.com/speed/webp/docs/riff_container
    """
    offset = 12
    while data.startswith(b"RIFF") and offset + 8 <= len(data):
        name, size = data[offset : offset + 4], int.from_bytes(data[offset + 4 : offset + 8], "little")
        if name in (b"VP8L", b"VP8 "):
            return name == b"VP8L"
        # A frame's chunks follow 16 bytes of its own.
        offset += 24 if name == b"ANMF" else 8 + size + size % 2
    return False


def is_heic(data: bytes) -> bool:
    """Whether the file is a HEIF picture that is encoded with HEVC, as phones write it."""
    size = int.from_bytes(data[:4], "big")
    brands = {data[place : place + 4] for place in range(8, min(size, len(data), 256), 4)}
    is_hevc = brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
    return data[4:8] == b"ftyp" and bool(is_hevc or (brands & {b"mif1", b"msf1"} and not brands & {b"avif", b"avis"}))


def is_avif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"mif1", b"msf1") and not is_heic(data)


def avif_colour_codes(data: bytes) -> tuple[int, int] | None:
    """The code points of primaries and curve in the first `colr` box of kind `nclx`; None without one.

    ISO/IEC 23008-12, 9.3 and 6.5.5: such a box is in meta/iprp/ipco.
    """
    meta = _box(data, b"meta")[4:]  # after version and flags
    for name, body in _boxes(_box(_box(meta, b"iprp"), b"ipco")):
        if name == b"colr" and body.startswith(b"nclx") and len(body) >= 8:
            return int.from_bytes(body[4:6], "big"), int.from_bytes(body[6:8], "big")
    return None


def _box(data: bytes, name: bytes) -> bytes:
    """The body of the first box of this name; empty without one."""
    return next((body for found, body in _boxes(data) if found == name), b"")


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each box's name and body. A box of 4 GiB or more is not read."""
    offset = 0
    while offset + 8 <= len(data):
        size = int.from_bytes(data[offset : offset + 4], "big") or len(data) - offset
        yield data[offset + 4 : offset + 8], data[offset + 8 : offset + size]
        offset += max(size, 8)
