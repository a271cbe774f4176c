"""Image files in and out: decode what strangers upload, encode what models draw, carry the provenance record.

Pillow only. Uploads go through `UploadDecoder`, in a process of its own with limited memory and time; everything else
here runs where it is called and expects files that this module wrote.
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
from collections.abc import Mapping
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, unescape

import orjson

# Named so that Pillow loads these three and not its whole family at the first open.
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin

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
    # A JPEG with a second picture behind it (depth map, gain map), as many phones write them; the first one counts.
    MpoImagePlugin.MpoImageFile.format: ImageFormat.JPEG,
    PngImagePlugin.PngImageFile.format: ImageFormat.PNG,
    WebPImagePlugin.WebPImageFile.format: ImageFormat.WEBP,
}
# What Pillow raises on bytes that are not what they claim, found by mutating real files.
DECODER_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    struct.error,
)
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
UPLOAD_QUALITY = 95
THUMBNAIL_SIDE = 256


@dataclass(frozen=True)
class DecodedImage:
    """An upload after decoding: RGB on white, upright, in sRGB, without any metadata."""

    format: ImageFormat
    width: int
    height: int
    sha256: str
    """Of the upload as it came, in hex."""
    perceptual_hash: int
    """dHash, as a signed 64-bit integer; see `perceptual_hash`."""
    data: bytes
    """Encoded again in its own format."""
    thumbnail: bytes
    """WebP, longest side 256 pixels."""


def decode_upload(data: bytes, *, max_bytes: int, max_pixels: int) -> DecodedImage:
    """Decode a file that a stranger sent, and encode it again.

    The type is told by content. Transparency becomes white, EXIF orientation is applied, 16-bit samples become 8-bit,
    a colour profile is converted to sRGB, and every byte of metadata is dropped.

    Raises:
        ImageTooLargeError: more than `max_bytes`, or more than `max_pixels` (told from the header, before decoding).
        UnsupportedImageTypeError: neither PNG, JPEG nor WebP by content.
        AnimatedImageError: more than one frame.
        InvalidImageError: empty, truncated or damaged.
    """
    if not data:
        raise InvalidImageError("The file is empty.")
    if len(data) > max_bytes:
        raise ImageTooLargeError(f"The file has {len(data)} bytes; at most {max_bytes} are accepted.")
    if not _is_supported(data):
        raise UnsupportedImageTypeError
    try:
        if data.startswith(b"\x89PNG"):
            # Decoding does not look behind the last pixel; this checks every chunk.
            with Image.open(io.BytesIO(data), formats=["PNG"]) as unread:
                unread.verify()
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as file:
            if file.width * file.height > max_pixels:
                raise ImageTooLargeError(
                    f"The image has {file.width} x {file.height} pixels; at most {max_pixels} are accepted."
                )
            image_format = FORMATS[file.format]
            if image_format is not ImageFormat.JPEG and getattr(file, "n_frames", 1) > 1:
                raise AnimatedImageError
            file.load()
            picture = _rgb_on_white(_upright(file))
        return DecodedImage(
            format=image_format,
            width=picture.width,
            height=picture.height,
            sha256=hashlib.sha256(data).hexdigest(),
            perceptual_hash=perceptual_hash(picture),
            data=_encode(picture, image_format, quality=UPLOAD_QUALITY, lossless=_is_lossless_webp(data)),
            thumbnail=thumbnail(picture),
        )
    except BOMBS:
        raise ImageTooLargeError(f"At most {max_pixels} pixels are accepted.") from None
    except DECODER_FAULTS as error:
        raise InvalidImageError("The image is damaged or incomplete.") from error


def encode_image(
    pixels: "Pixels", *, image_format: ImageFormat, quality: int = 90, record: Mapping[str, Any] | None = None
) -> bytes:
    """A generated image as a file that carries its own provenance.

    Equal arguments give equal bytes. `quality` (1 to 100) counts for JPEG and WebP. `record` is any JSON object; it
    is kept whole, whatever its length: PNG as the iTXt chunk "afterimage", JPEG and WebP as the XMP property
    `afterimage:record`.

    Raises:
        InvalidOutputError: `pixels` is not uint8 of shape (H, W, 3) with H, W >= 1.
    """
    if pixels.dtype != "uint8" or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise InvalidOutputError(shape=list(pixels.shape), dtype=str(pixels.dtype))
    return _encode(Image.fromarray(pixels), image_format, quality=quality, record=record)


def read_record(data: bytes) -> dict[str, Any] | None:
    """The provenance record inside a PNG, JPEG or WebP file; None when there is none that can be read."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as file:
            # str(): Pillow answers with a kind of str that orjson does not take.
            text = str(file.info.get("afterimage", "")) if file.format == "PNG" else _record_in_xmp(_xmp_packet(file))
    except (*DECODER_FAULTS, *BOMBS):
        return None
    try:
        record = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def open_image(data: bytes) -> Image.Image:
    """A stored image, decoded to RGB.

    Raises:
        InvalidImageError: the bytes are not a whole PNG, JPEG or WebP file.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as file:
            return file.convert("RGB")
    except (*DECODER_FAULTS, *BOMBS) as error:
        raise InvalidImageError("The stored image is damaged.") from error


def thumbnail(picture: "Image.Image | Pixels") -> bytes:
    """A small WebP of an RGB image or of uint8 pixels (H, W, 3): longest side 256 pixels, never enlarged."""
    small = picture.copy() if isinstance(picture, Image.Image) else Image.fromarray(picture)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.HAMMING)
    return _encode(small, ImageFormat.WEBP, quality=80, method=2)


def pixels_sha256(pixels: "Pixels") -> str:
    """The digest, in hex, of uint8 pixels (H, W, 3) and their shape: equal pictures in any file format are equal."""
    return hashlib.sha256(b"%dx%d:" % pixels.shape[:2] + pixels.tobytes()).hexdigest()


def perceptual_hash(picture: Image.Image) -> int:
    """Which neighbours grow brighter to the right in a 9 x 8 reduction, as a signed 64-bit integer.

    dHash of Neal Krawetz, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html. Small
    changes of size, quality or tone flip few bits (see `hash_distance`). Every plain-coloured image has hash 0.
    """
    grey = picture.convert("L").resize((9, 8), Image.Resampling.LANCZOS).tobytes()
    bits = [grey[row * 9 + x] < grey[row * 9 + x + 1] for row in range(8) for x in range(8)]
    value = sum(1 << place for place, bit in enumerate(bits) if bit)
    return value - 2**64 if value >= 2**63 else value


def hash_distance(a: int, b: int) -> int:
    """In how many of its 64 bits a perceptual hash differs from another; up to about 10 is the same picture."""
    return ((a ^ b) & (2**64 - 1)).bit_count()


# --- reading ------------------------------------------------------------------------------------------------------


def _is_supported(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp or data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))


def _upright(file: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(file)
    except DECODER_FAULTS:
        return file  # the pixels are whole; an EXIF block that cannot be read says nothing about orientation


def _rgb_on_white(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        image = image.point(lambda value: value * (1 / 256)).convert("L")  # convert() alone clips 16 bits to white
    elif image.mode not in ("RGB", "CMYK", "L") or "transparency" in image.info:
        image = image.convert("RGBA")
    image = _in_srgb(image, profile) if profile else image
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    image = image.convert("RGB")
    image.info = {}  # what is left here would be written into the new file
    return image


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, *DECODER_FAULTS):
        return image  # a profile that is damaged or for another kind of pixels counts as absent, as in browsers
    return image if converted is None else converted


# --- writing ------------------------------------------------------------------------------------------------------


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the picture is in a `VP8L` chunk: https://developers.google.com/speed/webp/docs/riff_container."""
    at = 12
    while data.startswith(b"RIFF") and at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name in (b"VP8L", b"VP8 "):
            return name == b"VP8L"
        at += 8 + size + size % 2
    return False


def _encode(
    picture: Image.Image,
    image_format: ImageFormat,
    *,
    quality: int,
    lossless: bool = False,
    method: int = 4,
    record: Mapping[str, Any] | None = None,
) -> bytes:
    """method: of WebP; 2 takes half the time of the default 4, and 5 % more bytes."""
    text = None if record is None else orjson.dumps(record, option=orjson.OPT_SORT_KEYS).decode()
    file = io.BytesIO()
    match image_format:
        case ImageFormat.PNG:
            chunks = PngImagePlugin.PngInfo()
            if text is not None:
                chunks.add_itxt("afterimage", text)
            # Level 3 takes two thirds of the default's time and 10 % more bytes.
            picture.save(file, "PNG", pnginfo=chunks, compress_level=3)
        case ImageFormat.JPEG:
            segments = b"" if text is None else _xmp_segments(text)
            picture.save(file, "JPEG", quality=quality, subsampling=0, extra=segments)
        case ImageFormat.WEBP:
            xmp = b"" if text is None else _xmp(_record_property(text))
            # Lossless: the fastest method, because quality then only buys size with time.
            how = {"lossless": True, "quality": 0, "method": 0} if lossless else {"quality": quality, "method": method}
            picture.save(file, "WEBP", xmp=xmp, **how)
    return file.getvalue()


XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
XMP_EXTENSION_HEADER = b"http://ns.adobe.com/xmp/extension/\0"
# A JPEG segment holds 65,533 bytes; the rest of each is for its headers.
XMP_SEGMENT_BYTES = 65_000


def _xmp(properties: str) -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="">'
        f'{properties}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def _record_property(text: str) -> str:
    return f'<afterimage:record xmlns:afterimage="urn:afterimage:1">{escape(text)}</afterimage:record>'


def _xmp_segments(text: str) -> bytes:
    """The record as APP1 segments of a JPEG; a packet too long for one segment goes by the extension rule.

    XMP specification part 3 (2020), section 1.1.3.1: the main packet names the MD5 of the long one, which follows in
    pieces that each give that name, the full length and their own offset.
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
    named = re.search(rb"HasExtendedXMP[^>]*>([0-9A-F]{32})<", packet)
    if named is None or not isinstance(file, JpegImagePlugin.JpegImageFile):
        return packet
    header = XMP_EXTENSION_HEADER + named[1]
    pieces = [data[len(header) :] for _, data in file.applist if data.startswith(header)]
    # Each piece: full length and offset, 4 bytes each, then its bytes.
    return b"".join(piece[8:] for piece in sorted(pieces, key=lambda piece: piece[4:8]))


def _record_in_xmp(packet: bytes) -> str:
    # By pattern: the packet may come from anyone, and an XML parser is one more thing to attack.
    found = re.search(rb"<afterimage:record[^>]*>([^<]*)</afterimage:record>", packet)
    return "" if found is None else unescape(found[1].decode())


# --- uploads, in a process of their own ---------------------------------------------------------------------------


class UploadDecoder:
    """Runs `decode_upload` in child processes, so that hostile bytes cannot take the caller down.

    Each child decodes one file at a time with limited memory, ends itself when a file takes longer than
    `decode_timeout_s`, and ends with its parent. Children start at first use. Safe to share between threads.
    """

    def __init__(self, settings: "APISettings") -> None:
        self._settings = settings
        self._closed = threading.Event()
        # First come, first served: who decodes many files, one after the other, would else be ahead of all who wait.
        self._turns = ThreadPoolExecutor(settings.decoder_processes, thread_name_prefix="decoder")
        # One pool per child: when a child dies, the file it held is the one to blame.
        self._idle: queue.LifoQueue[ProcessPoolExecutor | None] = queue.LifoQueue()
        for _ in range(settings.decoder_processes):
            self._idle.put(None)
        # A process that multiprocessing started, as servers start theirs, joins its own children before it would tell
        # a pool to end them, and so would never end. This comes before that, and before the pool's queues close (10).
        self._at_exit = Finalize(None, self.close, exitpriority=20)

    def decode(self, data: bytes) -> DecodedImage:
        """Like `decode_upload`, with the limits of the settings, when it is this file's turn.

        Raises:
            InvalidImageError: and its kinds; also when decoding crashed twice or ran out of time.
            DecoderBusyError: its turn did not come within `decode_timeout_s`.
        """
        if len(data) > self._settings.max_upload_bytes:
            raise ImageTooLargeError(
                f"The file has {len(data)} bytes; at most {self._settings.max_upload_bytes} are accepted."
            )
        if self._closed.is_set():
            raise DecoderBusyError
        try:
            turn = self._turns.submit(self._decode, data)
            try:
                return turn.result(self._settings.decode_timeout_s)
            except TimeoutError:
                if turn.cancel():
                    raise DecoderBusyError from None
                return turn.result()  # its turn has come, and ends in time by itself
        except (CancelledError, RuntimeError):
            if not self._closed.is_set():
                raise
            raise DecoderBusyError from None

    def _decode(self, data: bytes) -> DecodedImage:
        try:
            # There are as many threads as pools; only `close` may have taken this one's.
            pool = self._idle.get(timeout=self._settings.decode_timeout_s)
        except queue.Empty:
            raise DecoderBusyError from None
        started = time.monotonic()
        try:
            for _ in range(2):  # the first death may be the child's own: killed while idle, or by the kernel
                pool = pool or self._started_pool()
                try:
                    return pool.submit(_decode_in_child, data, self._settings).result()
                except BrokenProcessPool:
                    pool.shutdown()
                    pool = None
                if time.monotonic() - started > self._settings.decode_timeout_s:
                    break
            raise InvalidImageError("Decoding this image takes more time or memory than this service gives.")
        finally:
            self._idle.put(pool)

    def close(self) -> None:
        """End every child; a file being decoded is finished first, and later ones are refused."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._at_exit.cancel()
        self._turns.shutdown(wait=False, cancel_futures=True)
        for _ in range(self._settings.decoder_processes):
            pool = self._idle.get()
            if pool is not None:
                pool.shutdown()

    def _started_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare_child,
            initargs=(self._settings,),
        )


def _prepare_child(settings: "APISettings") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    warnings.filterwarnings("ignore", module="PIL")  # remarks on strangers' metadata, which is dropped anyway
    end_with_parent()
    with suppress(ImportError, ValueError, OSError):  # no such limit on this system, or a lower one already
        import resource

        # Decoded, flattened and encoded copies take up to 32 bytes per pixel at once, beside the interpreter.
        memory = 512 * 2**20 + 4 * settings.max_upload_bytes + 32 * settings.max_upload_pixels
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _decode_in_child(data: bytes, settings: "APISettings") -> DecodedImage:
    # The alarm's default action ends the process, also in the middle of a C loop that never comes back to Python.
    signal.setitimer(signal.ITIMER_REAL, settings.decode_timeout_s)
    try:
        return decode_upload(data, max_bytes=settings.max_upload_bytes, max_pixels=settings.max_upload_pixels)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
