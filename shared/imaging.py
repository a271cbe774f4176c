"""Image files: decodes uploads, encodes generated images, and embeds the provenance record.

It uses only Pillow. `UploadDecoder` decodes uploads in child processes with limited memory and time. The other
functions run in the calling process and expect files that this module wrote.
"""

import hashlib
import io
import multiprocessing
import queue
import re
import signal
import struct
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, unescape

import orjson

# These imports make Pillow load only these plugins, and not all of them at the first open.
from PIL import (
    AvifImagePlugin,
    ExifTags,
    Image,
    ImageChops,
    ImageCms,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from shared import colour_profiles, image_files
from shared.child_processes import end_with_parent
from shared.contracts.common import ImageFormat
from shared.errors import (
    AnimatedImageError,
    DecoderBusyError,
    ImageTooLargeError,
    InvalidImageError,
    InvalidOutputError,
    UnsupportedImageTypeError,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from shared.settings import APISettings

    Pixels = npt.NDArray[np.uint8]

FORMATS: dict[str | None, ImageFormat] = {
    JpegImagePlugin.JpegImageFile.format: ImageFormat.JPEG,
    # A JPEG with a second picture (depth map, gain map) after the first, as many phones write. The first one is used.
    MpoImagePlugin.MpoImageFile.format: ImageFormat.JPEG,
    PngImagePlugin.PngImageFile.format: ImageFormat.PNG,
    WebPImagePlugin.WebPImageFile.format: ImageFormat.WEBP,
    # Stored as WebP, which the rest of the service reads.
    AvifImagePlugin.AvifImageFile.format: ImageFormat.WEBP,
}
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF")
# The errors that Pillow raises for damaged files, found by mutating real ones.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    RuntimeError,
    struct.error,
)
DECOMPRESSION_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
UPLOAD_QUALITY = 95
THUMBNAIL_SIDE = 256
WEBP_MAX_SIDE = 16_383
UPRIGHT: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture is turned, by its EXIF orientation."""
JPEG_FILLERS = (
    hashlib.sha512(b"a").hexdigest().encode(),
    b"\x5a" * 64,
    hashlib.sha512(b"b").hexdigest().encode(),
    b"\xff\0" * 64,
    bytes(64),
)
"""Bytes without a marker: no filler contains 0xFF but before zero."""
SPARE_ZEROS = 8
"""Bytes of zeros before an end marker. An encoder may align its data with fewer."""


@dataclass(frozen=True)
class DecodedImage:
    """An upload after decoding: RGB on white, upright, in sRGB, without any metadata."""

    format: ImageFormat
    width: int
    height: int
    sha256: str
    """SHA-256 of the upload's bytes, in hex."""
    perceptual_hash: int
    """dHash, as a signed 64-bit integer; see `perceptual_hash`."""
    data: bytes
    """The picture, encoded again in the upload's format; an AVIF as WebP."""
    thumbnail: bytes
    """WebP, longest side 256 pixels."""


def decode_upload(data: bytes, *, max_bytes: int, max_pixels: int) -> DecodedImage:
    """Decode an uploaded file, and encode it again.

    The content decides the type, not the name. Transparency becomes white, EXIF orientation is applied, 16-bit samples
    become 8-bit, colours are converted to sRGB as browsers do, and all metadata is dropped. A JPEG or PNG without its
    end marker is accepted when no pixel is missing.

    Raises:
        ImageTooLargeError: the file has more than `max_bytes`, or more than `max_pixels`. The header gives the number
            of pixels before decoding.
        UnsupportedImageTypeError: the content is neither PNG, JPEG, WebP nor AVIF.
        AnimatedImageError: the image has more than one frame.
        InvalidImageError: the file is empty, truncated or damaged, or has too many scans, chunks or segments.
    """
    if not data:
        raise InvalidImageError("The file is empty.")
    if len(data) > max_bytes:
        raise ImageTooLargeError(f"The file has {len(data)} bytes; at most {max_bytes} are accepted.")
    if image_files.is_heic(data):
        raise UnsupportedImageTypeError("HEIC images are not accepted. Convert the file to JPEG, PNG, WebP or AVIF.")
    if not _is_supported(data):
        raise UnsupportedImageTypeError
    sha256 = hashlib.sha256(data).hexdigest()
    png = image_files.read_png(data) if data.startswith(b"\x89PNG") else None
    try:
        if png is not None:
            sent, data = data, image_files.readable_png(data, png)
            # Decoding stops at the last pixel, so this checks all chunks, also those after it.
            with Image.open(io.BytesIO(data), formats=["PNG"]) as unread:
                unread.verify()
        elif data.startswith(b"\xff\xd8"):
            data = _completed_jpeg(data, max_pixels=max_pixels)
        with Image.open(io.BytesIO(data), formats=UPLOAD_FORMATS) as file:
            if file.width * file.height > max_pixels:
                raise ImageTooLargeError(
                    f"The image has {file.width} x {file.height} pixels; at most {max_pixels} are accepted."
                )
            image_format = FORMATS[file.format]
            if image_format is not ImageFormat.JPEG and getattr(file, "n_frames", 1) > 1:
                raise AnimatedImageError
            file.load()
            if png is not None and not image_files.has_all_rows(sent, png):
                raise InvalidImageError("The image is damaged or incomplete.")
            image = file if png is None else _with_key_as_alpha(file, png, data)
            profile = file.info.get("icc_profile")
            if png is not None:
                profile = colour_profiles.of_png(png.chunks, image_files.png_profile(png))
            elif file.format == "AVIF":
                profile = colour_profiles.of_avif(image_files.avif_colour_codes(data), profile)
            picture = _rgb_on_white(_with_exif_orientation(image), profile)
            is_lossless = image_files.is_lossless_webp(data)
            if file.format == "AVIF" and max(picture.size) > WEBP_MAX_SIDE:
                image_format = ImageFormat.PNG
        return DecodedImage(
            format=image_format,
            width=picture.width,
            height=picture.height,
            sha256=sha256,
            perceptual_hash=perceptual_hash(picture),
            data=_encode(picture, image_format, quality=UPLOAD_QUALITY, lossless=is_lossless),
            thumbnail=thumbnail(picture),
        )
    except DECOMPRESSION_BOMBS:
        raise ImageTooLargeError(f"At most {max_pixels} pixels are accepted.") from None
    except DECODER_ERRORS as error:
        raise InvalidImageError("The image is damaged or incomplete.") from error


def encode_image(
    pixels: "Pixels", *, image_format: ImageFormat, quality: int = 90, record: Mapping[str, Any] | None = None
) -> bytes:
    """Encode a generated image as a file that contains its provenance record.

    Equal arguments give equal bytes.

    pixels: uint8, shape (H, W, 3), RGB. quality: 1 to 100, used by JPEG and WebP. record: a JSON object of any length.
    PNG stores it as the iTXt chunk "afterimage", JPEG and WebP as the XMP property `afterimage:record`.

    Raises:
        InvalidOutputError: `pixels` is not uint8 of shape (H, W, 3) with H, W >= 1.
    """
    if pixels.dtype != "uint8" or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InvalidOutputError(shape=list(pixels.shape), dtype=str(pixels.dtype))
    data = _encode(Image.fromarray(pixels), image_format, quality=quality)
    return data if record is None else with_record(data, record)


def with_record(data: bytes, record: Mapping[str, Any]) -> bytes:
    """Add a provenance record to a file that `encode_image` made without one. The image data stay as they are.

    record: a JSON object of any length.
    """
    text = orjson.dumps(record, option=orjson.OPT_SORT_KEYS).decode()
    if data.startswith(PNG_SIGNATURE):
        chunk = io.BytesIO()
        PngImagePlugin.putchunk(chunk, b"iTXt", b"afterimage\0\0\0\0\0", text.encode())
        return data[:PNG_HEADER_BYTES] + chunk.getvalue() + data[PNG_HEADER_BYTES:]
    if data.startswith(b"RIFF"):
        return _webp_with_xmp(data, _xmp(_record_property(text)))
    return data[:JPEG_HEADER_BYTES] + _xmp_segments(text) + data[JPEG_HEADER_BYTES:]


def read_record(data: bytes) -> dict[str, Any] | None:
    """The provenance record inside a PNG, JPEG or WebP file; None when it is missing or cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as file:
            # str(): Pillow returns a subclass of str that orjson does not accept.
            text = str(file.info.get("afterimage", "")) if file.format == "PNG" else _record_in_xmp(_xmp_packet(file))
    except (*DECODER_ERRORS, *DECOMPRESSION_BOMBS):
        return None
    try:
        record = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def open_image(data: bytes) -> Image.Image:
    """Decode a stored image to RGB.

    Raises:
        InvalidImageError: `data` is not a complete PNG, JPEG or WebP file.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as file:
            return file.convert("RGB")
    except (*DECODER_ERRORS, *DECOMPRESSION_BOMBS) as error:
        raise InvalidImageError("The stored image is damaged.") from error


def thumbnail(picture: "Image.Image | Pixels") -> bytes:
    """A WebP thumbnail of an RGB image or of uint8 pixels (H, W, 3). Its longest side is at most 256 pixels."""
    small = picture.copy() if isinstance(picture, Image.Image) else Image.fromarray(picture)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.HAMMING)
    return _encode(small, ImageFormat.WEBP, quality=80, method=2)


def pixels_sha256(picture: "Image.Image | Pixels") -> str:
    """The SHA-256, in hex, of an RGB image or of uint8 pixels (H, W, 3), and of their shape.

    It does not depend on the file format.
    """
    shape = picture.size[::-1] if isinstance(picture, Image.Image) else picture.shape[:2]
    return hashlib.sha256(b"%dx%d:" % shape + picture.tobytes()).hexdigest()


def perceptual_hash(picture: Image.Image) -> int:
    """The dHash of an image, as a signed 64-bit integer.

    The image is reduced to 9 x 8 grey pixels. Each bit says whether a pixel is darker than its right neighbour. The
    algorithm is Neal Krawetz's, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html. Small
    changes of size, quality or tone flip few bits (see `hash_distance`). Every image of a single colour has hash 0.
    """
    grey = picture.convert("L").resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    bits = [grey[row * 9 + x] < grey[row * 9 + x + 1] for row in range(8) for x in range(8)]
    value = sum(1 << position for position, bit in enumerate(bits) if bit)
    return value - 2**64 if value >= 2**63 else value


def hash_distance(a: int, b: int) -> int:
    """The number of bits, 0 to 64, in which two perceptual hashes differ. Up to about 10 it is the same picture."""
    return ((a ^ b) & (2**64 - 1)).bit_count()


# --- reading ------------------------------------------------------------------------------------------------------


def _is_supported(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or image_files.is_avif(data) or data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))


def _completed_jpeg(data: bytes, *, max_pixels: int) -> bytes:
    """The file with its end marker. Browsers show a JPEG without it; one that misses pixels is refused.

    libjpeg replaces missing data without an error, also before an end marker. So the file is decoded several times,
    with different bytes after its own. The pictures are equal only when no pixel was decoded from these bytes.
    """
    jpeg = image_files.read_jpeg(data)
    # An arithmetic encoder may leave zeros at the end out (ITU T.81, D.1.8).
    if not jpeg.scans or (jpeg.has_end and jpeg.is_arithmetic):
        return data
    if jpeg.open_coefficients and not jpeg.has_end:
        raise InvalidImageError("The image is damaged or incomplete.")
    known = data[: jpeg.entropy_end]
    if not jpeg.has_end:
        known = known.rstrip(b"\xff")
    with Image.open(io.BytesIO(known), formats=["JPEG"]) as header:
        if header.width * header.height > max_pixels:
            return data  # the caller refuses it before decoding
    restart = image_files.next_restart_marker(data, jpeg)
    fillers = [filler + restart + filler for filler in JPEG_FILLERS]
    picture = _decoded_jpeg(known)
    # Each filler costs a decoding. A file with an end marker is nearly always whole, so one filler is enough:
    # it shows 99.9 % of the cuts.
    is_whole = _same_pixels(picture, known, fillers[:1] if jpeg.has_end else fillers)
    spare = bytes(SPARE_ZEROS if jpeg.has_end else 1)
    if is_whole and known.endswith(spare):
        # The zeros may fill a file that was cut. Then there are more of them than the picture uses.
        written = known.rstrip(b"\0")
        written += b"\0" * written.endswith(b"\xff")
        # In a flat picture only few bits of a byte change pixels.
        ones = [bytes([pattern >> bit]) + fillers[0] for pattern in (0b10000000, 0b10100000) for bit in range(8)]
        has_more = _same_pixels(picture, known[: -len(spare)], ones)
        is_whole = not has_more or _same_pixels(picture, written, fillers)
    if not is_whole:
        raise InvalidImageError("The image is damaged or incomplete.")
    return data if jpeg.has_end else known + image_files.JPEG_END


def _same_pixels(picture: Image.Image, data: bytes, fillers: list[bytes]) -> bool:
    """Whether a JPEG is decoded to this picture with each filler after its data."""
    decoded = (_decoded_jpeg(data + filler) for filler in fillers)
    return all(ImageChops.difference(picture, each).getbbox() is None for each in decoded)


def _decoded_jpeg(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data + image_files.JPEG_END), formats=["JPEG"]) as file:
        file.load()
        return file


def _with_key_as_alpha(file: Image.Image, png: image_files.Png, data: bytes) -> Image.Image:
    """A PNG whose transparent colour has become an alpha channel. The whole sample is compared, also of 16 bits."""
    key = image_files.png_key(png)
    if key is None:
        return file.convert("LA") if png.is_grey_alpha else file  # Pillow reads one of 16 bits as RGBA
    if png.is_grey and png.depth == 16:
        values = file.convert("I")
        image = values.point([value >> 8 for value in range(2**16)], "L")
        alpha = values.point([0 if value == key[0] else 255 for value in range(2**16)], "L")
    elif png.is_grey:
        image = file.convert("L")
        alpha = _differs(image, key[0] * 255 // (2**png.depth - 1))
    else:
        image, alpha = file.convert("RGB"), Image.new("L", file.size, 0)
        planes = list(zip(image.split(), (value >> (png.depth - 8) for value in key), strict=True))
        if png.depth == 16:
            planes += zip(_low_bytes(data).split(), (value & 255 for value in key), strict=True)
        for plane, value in planes:
            alpha = ImageChops.lighter(alpha, _differs(plane, value))
    image.putalpha(alpha)
    image.info = {name: value for name, value in file.info.items() if name != "transparency"}
    return image


def _differs(plane: Image.Image, value: int) -> Image.Image:
    return plane.point([0 if sample == value else 255 for sample in range(256)])


def _low_bytes(data: bytes) -> Image.Image:
    """The low bytes of a 16-bit RGB file, of which Pillow keeps the high ones."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
        file.tile = [tile._replace(args="RGB;16L") for tile in file.tile]
        file.load()
        return file.copy()


def _with_exif_orientation(file: Image.Image) -> Image.Image:
    exif = Image.Exif()
    try:
        exif.load(file.info.get("exif", b""))  # `getexif` would also use the XMP packet
        turn = UPRIGHT.get(exif.get(ExifTags.Base.Orientation))
    except DECODER_ERRORS:
        return file  # only the EXIF block is damaged, so the orientation is unknown and the pixels are complete
    return file if turn is None else file.transpose(turn)


def _rgb_on_white(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode.startswith("I"):
        image = image.point(lambda value: value * (1 / 256)).convert("L")  # convert() alone clips 16 bits to white
    elif image.mode not in ("RGB", "CMYK", "L", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
    image = _in_srgb(image, profile) if profile else image
    if image.mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    image = image.convert("RGB")
    image.info = {}  # Pillow would write the remaining metadata into the new file
    return image


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        colours = image.convert(image.mode.removesuffix("A"))
        if space == "RGB":
            colours = colours.convert("RGB")
        elif {"L": "GRAY", "CMYK": "CMYK"}.get(colours.mode) != space:
            return image  # browsers ignore a profile for another kind of pixels
        to_srgb = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), colours.mode, "RGB")
        if colours.mode == "RGB" and _changes_nothing(to_srgb):
            return image
        converted = to_srgb.apply(colours)
    except (ImageCms.PyCMSError, *DECODER_ERRORS):
        return image  # a damaged profile is ignored, as browsers do
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform of RGB is the identity but for rounding. The description of a profile proves nothing."""
    levels = bytes(range(0, 256, 15))
    probe = Image.frombytes(
        "RGB", (18 * 18, 18), bytes(v for r in levels for g in levels for b in levels for v in (r, g, b))
    )
    difference = ImageChops.difference(probe, transform.apply(probe))
    return max(difference.tobytes()) <= 1


# --- writing ------------------------------------------------------------------------------------------------------


def _encode(
    picture: Image.Image,
    image_format: ImageFormat,
    *,
    quality: int,
    lossless: bool = False,
    method: int = 4,
) -> bytes:
    """Encode a picture. method: WebP's effort; 2 takes half the time of the default 4, and 5 % more bytes."""
    file = io.BytesIO()
    match image_format:
        case ImageFormat.PNG:
            # Level 3 takes two thirds of the default's time and 10 % more bytes.
            picture.save(file, "PNG", compress_level=3)
        case ImageFormat.JPEG:
            picture.save(file, "JPEG", quality=quality, subsampling=0)
        case ImageFormat.WEBP:
            # Lossless uses the fastest method: quality and method then only trade time for size.
            options = {"quality": quality, "method": method}
            if lossless:
                options = {"lossless": True, "quality": 0, "method": 0}
            picture.save(file, "WEBP", **options)
    return file.getvalue()


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER_BYTES = 33
"""The signature and the chunk IHDR."""
JPEG_HEADER_BYTES = 20
"""The start marker and the JFIF segment that Pillow writes."""
XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
XMP_EXTENSION_HEADER = b"http://ns.adobe.com/xmp/extension/\0"
XMP_SEGMENT_BYTES = 65_000
"""A JPEG segment holds 65,533 bytes; the difference is for the headers."""


def _webp_with_xmp(data: bytes, packet: bytes) -> bytes:
    """Make the extended file format of a simple one, with an XMP packet.

    https://developers.google.com/speed/webp/docs/riff_container#extended_file_format
    """
    with Image.open(io.BytesIO(data), formats=["WEBP"]) as file:
        canvas = (file.width - 1).to_bytes(3, "little") + (file.height - 1).to_bytes(3, "little")
    has_xmp = b"\x04\0\0\0"
    chunks = b"WEBP" + _riff_chunk(b"VP8X", has_xmp + canvas) + data[12:] + _riff_chunk(b"XMP ", packet)
    return _riff_chunk(b"RIFF", chunks)


def _riff_chunk(name: bytes, payload: bytes) -> bytes:
    return name + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


def _xmp(properties: str) -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="">'
        f'{properties}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _record_property(text: str) -> str:
    return f'<afterimage:record xmlns:afterimage="urn:afterimage:1">{escape(text)}</afterimage:record>'


def _xmp_segments(text: str) -> bytes:
    """The record as APP1 segments of a JPEG. A packet too long for one segment becomes an extended packet.

    XMP specification part 3 (2020), section 1.1.3.1: the main packet contains the MD5 of the extended one. The extended
    packet follows in pieces. Each piece has that MD5, the full length and its own offset.
    """
    packet = _xmp(_record_property(text))
    if len(packet) <= XMP_SEGMENT_BYTES:
        return _app1(XMP_HEADER + packet)
    name = hashlib.md5(packet, usedforsecurity=False).hexdigest().upper()
    main = _xmp(
        '<xmpNote:HasExtendedXMP xmlns:xmpNote="http://ns.adobe.com/xmp/note/">' + name + "</xmpNote:HasExtendedXMP>"
    )
    pieces = (
        XMP_EXTENSION_HEADER
        + name.encode()
        + struct.pack(">II", len(packet), offset)
        + packet[offset : offset + XMP_SEGMENT_BYTES]
        for offset in range(0, len(packet), XMP_SEGMENT_BYTES)
    )
    return b"".join(map(_app1, (XMP_HEADER + main, *pieces)))


def _app1(payload: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload


def _xmp_packet(file: Image.Image) -> bytes:
    packet: bytes = file.info.get("xmp", b"")
    extension_md5 = re.search(rb"HasExtendedXMP[^>]*>([0-9A-F]{32})<", packet)
    if extension_md5 is None or not isinstance(file, JpegImagePlugin.JpegImageFile):
        return packet
    header = XMP_EXTENSION_HEADER + extension_md5[1]
    pieces = [data[len(header) :] for _, data in file.applist if data.startswith(header)]
    # A piece starts with the full length and its offset, 4 bytes each.
    return b"".join(piece[8:] for piece in sorted(pieces, key=lambda piece: piece[4:8]))


def _record_in_xmp(packet: bytes) -> str:
    # A pattern instead of an XML parser: the packet may come from an attacker, and a parser adds attack surface.
    found = re.search(rb"<afterimage:record[^>]*>([^<]*)</afterimage:record>", packet)
    return "" if found is None else unescape(found[1].decode())


# --- uploads, in child processes ----------------------------------------------------------------------------------


class _Turns:
    """Places that owners take in turn. One owner never has all of several places."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._share = max(1, places - 1)
        self._lock = threading.Lock()
        self._running = Counter[Hashable]()
        self._waiting: dict[Hashable, deque[threading.Event]] = {}

    def take(self, owner: Hashable, *, timeout_s: float) -> bool:
        """Wait for a place; False after `timeout_s`. The caller must `release` the place."""
        granted = threading.Event()
        with self._lock:
            self._waiting.setdefault(owner, deque()).append(granted)
            self._grant()
        if granted.wait(timeout_s):
            return True
        with self._lock:
            if granted.is_set():
                return True
            self._waiting[owner].remove(granted)
            if not self._waiting[owner]:
                del self._waiting[owner]
            return False

    def release(self, owner: Hashable) -> None:
        with self._lock:
            self._free += 1
            self._running[owner] -= 1
            if not self._running[owner]:
                del self._running[owner]
            self._grant()

    def _grant(self) -> None:
        while self._free and (owners := [each for each in self._waiting if self._running[each] < self._share]):
            owner = min(owners, key=self._running.__getitem__)  # of equal ones, the one that has waited longest
            waiting = self._waiting.pop(owner)
            self._free -= 1
            self._running[owner] += 1
            waiting.popleft().set()
            if waiting:
                self._waiting[owner] = waiting


class UploadDecoder:
    """Runs `decode_upload` in child processes, so that a malicious file cannot crash the calling process.

    Each child decodes one file at a time with limited memory. It ends itself when a file takes longer than
    `decode_timeout_s`, and when its parent ends. Children start at first use. Safe to share between threads.
    """

    def __init__(self, settings: "APISettings") -> None:
        self._settings = settings
        self._closed = threading.Event()
        # Without turns, a caller that decodes many files could always go before others.
        self._turns = _Turns(settings.decoder_processes)
        # One pool per child: when a child crashes, only the file that it decoded can be the cause.
        self._idle_pools: queue.LifoQueue[ProcessPoolExecutor | None] = queue.LifoQueue()
        for _ in range(settings.decoder_processes):
            self._idle_pools.put(None)
        # The servers' processes are started by multiprocessing. At its end, such a process joins its children before
        # the pools stop them, and would wait forever. This finalizer runs before that, and before the pools' queues
        # close (priority 10).
        self._at_exit = Finalize(None, self.close, exitpriority=20)

    def decode(self, data: bytes, *, owner: Hashable = None) -> DecodedImage:
        """Decode one file as `decode_upload` does, with the limits of the settings.

        owner: owners take turns. One owner never occupies the last of several decoders.

        Raises:
            ImageTooLargeError, UnsupportedImageTypeError, AnimatedImageError: as in `decode_upload`.
            InvalidImageError: as in `decode_upload`, and when decoding crashed twice or took too long.
            DecoderBusyError: decoding did not start within `decode_timeout_s`, or the decoder is closed.
        """
        if len(data) > self._settings.max_upload_bytes:
            raise ImageTooLargeError(
                f"The file has {len(data)} bytes; at most {self._settings.max_upload_bytes} are accepted."
            )
        if self._closed.is_set() or not self._turns.take(owner, timeout_s=self._settings.decode_timeout_s):
            raise DecoderBusyError
        try:
            return self._decode(data)
        finally:
            self._turns.release(owner)

    def _decode(self, data: bytes) -> DecodedImage:
        if self._closed.is_set():
            raise DecoderBusyError
        try:
            # There are as many turns as pools, so a pool is missing only when `close` has taken it.
            pool = self._idle_pools.get(timeout=self._settings.decode_timeout_s)
        except queue.Empty:
            raise DecoderBusyError from None
        started = time.monotonic()
        try:
            for _ in range(2):  # the file may not be the cause of a first crash: the kernel can kill an idle child
                pool = pool or self._start_pool()
                try:
                    return pool.submit(_decode_in_child, data, self._settings).result()
                except BrokenProcessPool:
                    pool.shutdown()
                    pool = None
                if time.monotonic() - started > self._settings.decode_timeout_s:
                    break
            raise InvalidImageError("Decoding this image takes more time or memory than this service gives.")
        finally:
            self._idle_pools.put(pool)

    def close(self) -> None:
        """End every child. A file that is being decoded is finished first; later files are refused."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._at_exit.cancel()
        for _ in range(self._settings.decoder_processes):
            pool = self._idle_pools.get()
            if pool is not None:
                pool.shutdown()

    def _start_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare_child,
            initargs=(self._settings,),
        )


def _prepare_child(settings: "APISettings") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its children
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a child is one of several, and its memory is limited
    warnings.filterwarnings("ignore", module="PIL")  # warnings about metadata, which is dropped anyway
    end_with_parent()
    with suppress(ImportError, ValueError, OSError):  # the system has no such limit, or already a lower one
        import resource

        # All copies of a picture (decoded, flattened, encoded) take up to 32 bytes per pixel, besides the interpreter.
        memory = 512 * 2**20 + 4 * settings.max_upload_bytes + 32 * settings.max_upload_pixels
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _decode_in_child(data: bytes, settings: "APISettings") -> DecodedImage:
    # The alarm's default action ends the process, even inside a C loop that does not return to Python.
    signal.setitimer(signal.ITIMER_REAL, settings.decode_timeout_s)
    try:
        return decode_upload(data, max_bytes=settings.max_upload_bytes, max_pixels=settings.max_upload_pixels)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
