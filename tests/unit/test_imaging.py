"""Decoding of uploads, with real invalid bytes, and encoding of generated images."""

import io
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from shared.contracts.common import ImageFormat
from shared.errors import (
    AnimatedImageError,
    DecoderBusyError,
    ImageTooLargeError,
    InvalidImageError,
    InvalidOutputError,
    UnsupportedImageTypeError,
)
from shared.imaging import (
    DecodedImage,
    UploadDecoder,
    decode_upload,
    encode_image,
    hash_distance,
    open_image,
    perceptual_hash,
    pixels_sha256,
    read_record,
    thumbnail,
)
from shared.settings import APISettings
from tests.stack import wait_until

# Pillow warns of damaged metadata. These tests assert the result instead.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

FORMATS = list(ImageFormat)


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth colours, so that lossy formats keep them."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def decode(data: bytes, *, max_bytes: int = 2**22, max_pixels: int = 2**20) -> DecodedImage:
    return decode_upload(data, max_bytes=max_bytes, max_pixels=max_pixels)


def pixels_of(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(open_image(data)).astype(int)


# --- what is accepted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_upload_comes_back_in_its_own_format(image_format: ImageFormat) -> None:
    original = picture()
    data = encoded(original, image_format.value, quality=95)
    decoded = decode(data)
    assert (decoded.format, decoded.width, decoded.height) == (image_format, 60, 40)
    with Image.open(io.BytesIO(decoded.data)) as file:
        assert (file.format or "").lower() == image_format.value
    assert np.abs(pixels_of(decoded.data) - np.asarray(original)).mean() < 3
    with Image.open(io.BytesIO(decoded.thumbnail)) as file:
        assert (file.format, file.size) == ("WEBP", (60, 40))


def test_a_png_keeps_every_pixel() -> None:
    original = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8))
    assert np.array_equal(pixels_of(decode(encoded(original, "PNG")).data), np.asarray(original))


def test_the_digest_is_that_of_the_uploaded_bytes() -> None:
    import hashlib

    data = encoded(picture(), "PNG")
    assert decode(data).sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_image_may_have_a_single_pixel(image_format: ImageFormat) -> None:
    decoded = decode(encoded(Image.new("RGB", (1, 1), "red"), image_format.value))
    assert (decoded.width, decoded.height) == (1, 1)


def test_the_thumbnail_keeps_the_shape_and_never_enlarges() -> None:
    def size(data: bytes) -> tuple[int, int]:
        return open_image(data).size

    assert size(decode(encoded(picture(800, 400), "JPEG")).thumbnail) == (256, 128)
    assert size(decode(encoded(picture(2000, 1), "PNG")).thumbnail) == (256, 1)
    assert size(thumbnail(np.zeros((30, 20, 3), dtype=np.uint8))) == (20, 30)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert pixels_of(decode(encoded(clear, "PNG")).data)[4, 4].tolist() == [255, 255, 255]
    assert pixels_of(decode(encoded(half, "PNG")).data)[4, 4].tolist() == [255, 127, 127]
    assert pixels_of(decode(encoded(clear, "WEBP", lossless=True)).data)[4, 4].tolist() == [255, 255, 255]


def test_a_palette_with_a_transparent_entry_becomes_white_there() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    pixels = pixels_of(decode(encoded(image, "PNG", transparency=0)).data)
    assert pixels[0, 0].tolist() == [200, 100, 50]
    assert pixels[4, 4].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_mode_of_png_keeps_black_white_and_middle(mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.array([[0, 128, 255]], dtype=np.uint8), 3, axis=0).repeat(8, axis=1))
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    source = sixteen if mode == "I;16" else grey.convert(mode)
    row = pixels_of(decode(encoded(source, "PNG")).data)[1, [4, 12, 20], 0]
    assert (row[0], row[2]) == (0, 255)
    assert mode == "1" or row[1] == 128


def test_a_16_bit_colour_png_keeps_its_tones() -> None:
    samples = struct.pack(">3H", 0x1000, 0x8000, 0xF000)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" + samples))
        + chunk(b"IEND", b"")
    )
    assert pixels_of(decode(data).data)[0, 0].tolist() == [0x10, 0x80, 0xF0]


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = pixels_of(decode(data).data)[8, 8]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_rotated_photo_is_turned_upright(image_format: ImageFormat) -> None:
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 32, 32))  # the left half is dark
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view: the dark half is then at the top
    decoded = decode(encoded(image, image_format.value, exif=exif))
    assert (decoded.width, decoded.height) == (32, 64)
    pixels = pixels_of(decoded.data)
    assert pixels[10, 16].mean() < 30
    assert pixels[54, 16].mean() > 225


def test_a_photo_with_a_broken_exif_block_is_accepted() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    assert decode(data).width == 60


@pytest.mark.parametrize("image_format", FORMATS)
def test_no_metadata_survives(image_format: ImageFormat) -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret description"
    exif.get_ifd(0x8825)[1] = "N"
    options: dict[str, Any] = {"exif": exif, "icc_profile": _red_green_swapped_profile(b"secret profile")}
    options |= {"comment": b"secret comment"} if image_format is ImageFormat.JPEG else {}
    options |= {"xmp": b"<x>secret xmp</x>"} if image_format is not ImageFormat.PNG else {}
    if image_format is ImageFormat.PNG:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("Comment", "secret text")
        options |= {"pnginfo": info, "dpi": (300, 300)}
    data = encoded(picture(), image_format.value, **options)
    assert b"secret" in data
    decoded = decode(data)
    assert b"secret" not in decoded.data + decoded.thumbnail
    with Image.open(io.BytesIO(decoded.data)) as file:
        assert not file.getexif()
        assert not {"icc_profile", "exif", "xmp", "comment", "Comment"} & set(file.info)


def _red_green_swapped_profile(description: bytes = b"swapped") -> bytes:
    """An RGB profile whose red is green and whose green is red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    for place in range(132, 132 + 12 * count, 12):
        name = bytes(profile[place : place + 4])
        if name in (b"rXYZ", b"gXYZ"):
            profile[place : place + 4] = b"gXYZ" if name == b"rXYZ" else b"rXYZ"
        elif name == b"desc":
            offset = struct.unpack(">I", profile[place + 4 : place + 8])[0]
            text = description.decode().encode("utf-16-be")
            profile[offset + 28 : offset + 28 + len(text)] = text
    return bytes(profile) + description


def test_a_colour_profile_is_applied_before_it_is_dropped() -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    pixels = pixels_of(decode(encoded(red, "PNG", icc_profile=_red_green_swapped_profile())).data)
    assert pixels[4, 4, 1] > 150 > pixels[4, 4, 0]


def test_a_damaged_colour_profile_counts_as_absent() -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    pixels = pixels_of(decode(encoded(red, "PNG", icc_profile=b"not a profile")).data)
    assert pixels[4, 4].tolist() == [200, 30, 40]


def test_a_phones_jpeg_with_a_second_picture_after_it_is_one_image() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(20, 20, seed=1)])
    with Image.open(io.BytesIO(data)) as file:
        assert file.format == "MPO"
    decoded = decode(data)
    assert (decoded.format, decoded.width) == (ImageFormat.JPEG, 60)


def test_bytes_after_a_jpeg_are_dropped() -> None:
    decoded = decode(encoded(picture(), "JPEG") + b"PK\x03\x04<script>")
    assert b"<script>" not in decoded.data


# --- what is refused ----------------------------------------------------------------------------------------------

MINIMAL_PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("RGB", (8, 8)), "GIF"),
        encoded(Image.new("RGB", (8, 8)), "BMP"),
        encoded(Image.new("RGB", (8, 8)), "TIFF"),
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        b"<!doctype html><script>alert(1)</script>",
        MINIMAL_PDF,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"RIFF\x10\0\0\0AVI LIST",
        b"\0" * 1000,
        b"x",
    ],
    ids=["gif", "bmp", "tiff", "svg", "html", "pdf", "eps", "avi", "zeros", "one byte"],
)
def test_an_unsupported_type_is_recognised_by_content(data: bytes) -> None:
    with pytest.raises(UnsupportedImageTypeError):
        decode(data)


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(InvalidImageError, match="empty"):
        decode(b"")


@pytest.mark.parametrize(
    ("image_format", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("WEBP", {"lossless": True})],
)
def test_a_truncated_file_is_refused_at_every_length(image_format: str, options: dict[str, Any]) -> None:
    data = encoded(picture(24, 16), image_format, **options)
    # Without the end marker of a PNG or JPEG every pixel is there, so such a file is accepted.
    for length in range(1, len(data) - {"PNG": 12, "JPEG": 2}.get(image_format, 0)):
        with pytest.raises(InvalidImageError):
            decode(data[:length])


def test_a_png_with_one_flipped_bit_in_its_pixels_is_refused() -> None:
    data = bytearray(encoded(picture(), "PNG"))
    data[data.index(b"IDAT") + 40] ^= 1
    with pytest.raises(InvalidImageError):
        decode(bytes(data))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_an_animation_is_refused(image_format: str) -> None:
    data = encoded(picture(), image_format, save_all=True, append_images=[picture(seed=1)], duration=100)
    with pytest.raises(AnimatedImageError):
        decode(data)


def test_too_many_bytes_are_refused() -> None:
    data = encoded(picture(), "PNG")
    decode(data, max_bytes=len(data))
    with pytest.raises(ImageTooLargeError):
        decode(data, max_bytes=len(data) - 1)


def test_too_many_pixels_are_refused() -> None:
    data = encoded(picture(), "PNG")
    decode(data, max_pixels=60 * 40)
    with pytest.raises(ImageTooLargeError):
        decode(data, max_pixels=60 * 40 - 1)


def _claiming(width: int, height: int) -> bytes:
    """A small valid PNG whose header claims another size."""
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("size", [(10_000, 10_000), (13_000, 13_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageTooLargeError):
        decode(_claiming(*size))


@pytest.mark.parametrize("extra", [{}, {"exif": b"Exif\0\0"}], ids=["simple", "extended"])
def test_a_lossless_webp_keeps_every_pixel(extra: dict[str, bytes]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    decoded = decode(encoded(Image.fromarray(noise), "WEBP", lossless=True, **extra))
    assert np.array_equal(pixels_of(decoded.data), noise)


def test_a_webp_decompression_bomb_is_refused() -> None:
    data = bytearray(encoded(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "WEBP", exif=Image.Exif().tobytes() or b"x"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (16382).to_bytes(3, "little") * 2
    with pytest.raises(InvalidImageError):
        decode(bytes(data))


def test_more_pixels_than_a_header_claims_are_not_decoded() -> None:
    image_data = zlib.compress(b"\0" * 50_000_000, level=9)  # 48 KB of file, 50 MB of zeros, for an 8 x 8 image
    original = encoded(Image.new("RGB", (8, 8)), "PNG")
    start = original.index(b"IDAT") - 4
    chunk = b"IDAT" + image_data
    data = (
        original[:start]
        + struct.pack(">I", len(image_data))
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + original[-12:]
    )
    tracemalloc.start()
    with suppress(InvalidImageError):
        assert (decode(data).width, decode(data).height) == (8, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


AVIF_HEAD = b"\0\0\0\x14ftypavif\0\0\0\0avif"


@given(
    st.binary(max_size=400),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\1\0\0WEBPVP8 ", AVIF_HEAD]),
)
def test_random_bytes_are_always_an_invalid_image(tail: bytes, head: bytes) -> None:
    with pytest.raises(InvalidImageError):
        decode(head + tail)


SEEDS = [
    encoded(picture(20, 14), "PNG"),
    encoded(picture(20, 14), "JPEG", exif=Image.Exif().tobytes()),
    encoded(picture(20, 14), "JPEG", progressive=True),
    encoded(picture(20, 14), "WEBP"),
    encoded(picture(20, 14).convert("P"), "PNG", transparency=3),
    encoded(picture(20, 14), "PNG", icc_profile=_red_green_swapped_profile()),
    encoded(picture(20, 14), "AVIF"),
]


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_damaged_file_is_an_image_or_an_invalid_image(data: bytes, changes: list[tuple[float, int]]) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    try:
        decoded = decode(bytes(damaged))
    except InvalidImageError:
        return
    assert open_image(decoded.data).size == (decoded.width, decoded.height)


# --- hashes -------------------------------------------------------------------------------------------------------


def test_the_perceptual_hash_survives_resizing_and_compression() -> None:
    original = picture(200, 150)
    same = [original.resize((90, 70)), open_image(encoded(original, "JPEG", quality=40)), original.point(lambda v: v)]
    other = [picture(200, 150, seed=seed) for seed in range(1, 9)]
    assert max(hash_distance(perceptual_hash(original), perceptual_hash(image)) for image in same) <= 8
    assert min(hash_distance(perceptual_hash(original), perceptual_hash(image)) for image in other) > 12


def test_a_hash_fits_a_signed_bigint() -> None:
    values = [perceptual_hash(picture(seed=seed)) for seed in range(50)]
    assert all(-(2**63) <= value < 2**63 for value in values)
    assert any(value < 0 for value in values)
    assert hash_distance(-1, 0) == 64
    assert hash_distance(-(2**63), 2**62) == 2


def test_pixel_digests_differ_by_shape() -> None:
    flat = np.zeros((2, 3, 3), dtype=np.uint8)
    assert pixels_sha256(flat) == pixels_sha256(flat.copy())
    assert pixels_sha256(flat) != pixels_sha256(flat.reshape(3, 2, 3))
    assert pixels_sha256(flat) == pixels_sha256(np.zeros((2, 6, 3), dtype=np.uint8)[:, ::2])


# --- outputs and their record -------------------------------------------------------------------------------------

RECORD: dict[str, Any] = {
    "prompt": "ein roter Apfel, <b>\"bite\"</b> & 'so on' ]]> \\ 一口かじった赤いリンゴ 🍎\n\tnew line",
    "seeds": [0, 2**32 - 1],
    "guidance_scale": 7.5,
    "nothing": None,
    "references": [{"id": "0192d1f8", "similarity": -0.25}],
}


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("captions", [0, 200], ids=["short", "long"])
def test_the_record_is_read_back_unchanged(image_format: ImageFormat, captions: int) -> None:
    record = RECORD | {"captions": [f"🍎 & <{n}> " * 100 for n in range(captions)]}
    pixels = np.asarray(picture(64, 48))
    data = encode_image(pixels, image_format=image_format, quality=90, record=record)
    assert captions == 0 or len(data) > 200_000
    assert read_record(data) == record
    assert np.abs(pixels_of(data) - pixels).mean() < 4


def test_the_record_of_a_png_is_plain_json_in_a_text_chunk() -> None:
    data = encode_image(np.zeros((8, 8, 3), dtype=np.uint8), image_format=ImageFormat.PNG, record={"prompt": "Äpfel"})
    assert b'iTXtafterimage\0\0\0\0\0{"prompt":"' in data
    assert "Äpfel".encode() in data


def test_a_png_output_keeps_every_pixel_and_equal_calls_give_equal_bytes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    first, second = (encode_image(pixels, image_format=ImageFormat.PNG, record=RECORD) for _ in range(2))
    assert first == second
    assert pixels_sha256(np.asarray(open_image(first))) == pixels_sha256(pixels)


def test_a_higher_quality_makes_larger_files_in_lossy_formats() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image_format in (ImageFormat.JPEG, ImageFormat.WEBP):
        low, high = (len(encode_image(pixels, image_format=image_format, quality=quality)) for quality in (20, 95))
        assert low < high


def test_an_upload_of_an_output_loses_the_record() -> None:
    for image_format in FORMATS:
        data = encode_image(np.asarray(picture()), image_format=image_format, record=RECORD)
        assert read_record(decode(data).data) is None


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_file_without_record_has_none(image_format: ImageFormat) -> None:
    assert read_record(encode_image(np.asarray(picture()), image_format=image_format)) is None
    assert read_record(b"not an image") is None
    assert read_record(b"") is None


@given(st.integers(0, 2), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8))
def test_reading_the_record_of_a_damaged_file_never_raises(which: int, changes: list[tuple[float, int]]) -> None:
    damaged = bytearray(encode_image(np.asarray(picture(16, 16)), image_format=FORMATS[which], record=RECORD))
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    record = read_record(bytes(damaged))
    assert record is None or isinstance(record, dict)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
    ids=["float", "four channels", "grey", "empty"],
)
def test_an_array_that_is_not_an_image_is_not_encoded(pixels: Any) -> None:
    with pytest.raises(InvalidOutputError):
        encode_image(pixels, image_format=ImageFormat.PNG)


# --- the decoding processes ---------------------------------------------------------------------------------------


@pytest.fixture
def decoder() -> Iterator[UploadDecoder]:
    decoder = UploadDecoder(APISettings(decoder_processes=1))
    yield decoder
    decoder.close()


def decoding_children(parent: int | None = None) -> list[psutil.Process]:
    """The decoder's own processes, without the tracker of shared memory that multiprocessing starts."""
    return [
        child
        for child in psutil.Process(parent).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE
    ]


def test_no_process_starts_before_the_first_upload() -> None:
    decoder = UploadDecoder(APISettings())
    assert decoding_children() == []
    decoder.close()


def test_a_child_decodes_like_the_function(decoder: UploadDecoder) -> None:
    data = encoded(picture(), "JPEG")
    assert decoder.decode(data) == decode(data)
    assert len(decoding_children()) == 1
    decoder.decode(data)
    assert len(decoding_children()) == 1


def test_the_reason_of_a_refusal_crosses_the_process_border(decoder: UploadDecoder) -> None:
    with pytest.raises(UnsupportedImageTypeError):
        decoder.decode(b"GIF89a")
    with pytest.raises(AnimatedImageError):
        decoder.decode(encoded(picture(), "PNG", save_all=True, append_images=[picture(seed=1)]))
    with pytest.raises(ImageTooLargeError, match="10000 x 10000"):
        decoder.decode(_claiming(10_000, 10_000))
    with pytest.raises(ImageTooLargeError, match="bytes"):
        decoder.decode(b"x" * (APISettings().max_upload_bytes + 1))


def test_a_killed_child_is_replaced_without_an_error(decoder: UploadDecoder) -> None:
    data = encoded(picture(), "PNG")
    decoder.decode(data)
    (child,) = decoding_children()
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    assert decoder.decode(data).width == 60
    assert [other.pid for other in decoding_children()] != [child.pid]


def test_a_file_that_takes_too_long_is_refused_and_the_next_one_decoded() -> None:
    slow = encoded(Image.effect_noise((3000, 3000), 90).convert("RGB"), "PNG", compress_level=1)
    decoder = UploadDecoder(APISettings(decode_timeout_s=0.05, max_upload_bytes=2**26))
    try:
        with pytest.raises(InvalidImageError, match="time"):
            decoder.decode(slow)
        assert decoder.decode(encoded(picture(8, 8), "PNG")).width == 8
    finally:
        decoder.close()


def test_a_caller_with_many_files_does_not_delay_the_other_callers(decoder: UploadDecoder) -> None:
    data = encoded(picture(800, 800), "PNG")
    decoder.decode(data)
    done: list[str] = []

    def many() -> None:
        for _ in range(30):
            decoder.decode(data)
            done.append("many")

    def one() -> None:
        wait_until(lambda: done, timeout_s=20, what="the first of many")
        decoder.decode(data)
        done.append("one")

    threads = [threading.Thread(target=target) for target in (many, one, one)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done.count("one") == 2
    assert max(place for place, caller in enumerate(done) if caller == "one") < 12, done


def test_closing_ends_all_processes_and_refuses_later_uploads() -> None:
    decoder = UploadDecoder(APISettings(decoder_processes=2))
    data = encoded(picture(), "PNG")
    threads = [threading.Thread(target=decoder.decode, args=(data,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decoder.close()
    decoder.close()
    assert decoding_children() == []
    with pytest.raises(DecoderBusyError):
        decoder.decode(data)


OWNER = """
import sys, time
from PIL import Image
import io
from shared.imaging import UploadDecoder
from shared.settings import APISettings
if __name__ == "__main__":
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    decoder = UploadDecoder(APISettings())
    decoder.decode(file.getvalue())
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_parent_leaves_no_child(tmp_path: Any) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    (child,) = decoding_children(owner.pid)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"


def _decode_once(data: bytes) -> None:
    UploadDecoder(APISettings()).decode(data)


def test_a_server_process_that_has_decoded_can_exit() -> None:
    # A process of multiprocessing does not exit as a program does: it joins its children first.
    worker = multiprocessing.get_context("spawn").Process(target=_decode_once, args=(encoded(picture(), "PNG"),))
    worker.start()
    worker.join(20)
    ended = worker.exitcode
    worker.kill()
    assert ended == 0


def test_a_child_has_limited_memory(decoder: UploadDecoder) -> None:
    resource = pytest.importorskip("resource")
    decoder.decode(encoded(picture(), "PNG"))
    (child,) = decoding_children()
    soft, _ = child.rlimit(resource.RLIMIT_AS)
    assert 0 < soft < 4 * 2**30


def test_importing_imaging_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'numpy', 'scipy', 'flask', 'sqlalchemy'}"
    code = f"import sys, shared.imaging; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_one_owner_with_many_slow_files_leaves_a_decoder_to_the_others() -> None:
    slow = encoded(Image.effect_noise((2000, 2000), 90).convert("RGB"), "PNG", compress_level=1)
    quick = encoded(picture(8, 8), "PNG")
    decoder = UploadDecoder(APISettings(decoder_processes=2))
    done: list[str] = []

    def decode_as(owner: str, data: bytes) -> None:
        decoder.decode(data, owner=owner)
        done.append(owner)

    many = [threading.Thread(target=decode_as, args=("many", slow)) for _ in range(8)]
    try:
        for thread in many:
            thread.start()
        wait_until(lambda: done, timeout_s=60, what="the first of many")
        decode_as("other", quick)  # starts the second child
        before = done.count("many")
        decode_as("other", quick)
        assert done.count("many") <= before + 1
        assert done.count("many") < 8
        for thread in many:
            thread.join()
        assert done.count("many") == 8
    finally:
        decoder.close()


def test_owners_take_turns_at_a_single_decoder(decoder: UploadDecoder) -> None:
    data = encoded(picture(800, 800), "PNG")
    decoder.decode(data)
    done: list[str] = []

    def decode_as(owner: str) -> None:
        decoder.decode(data, owner=owner)
        done.append(owner)

    many = [threading.Thread(target=decode_as, args=("many",)) for _ in range(20)]
    for thread in many:
        thread.start()
    wait_until(lambda: done, timeout_s=20, what="the first of many")
    decode_as("other")
    assert done.index("other") <= 4, done
    for thread in many:
        thread.join()
