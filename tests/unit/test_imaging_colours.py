"""Colours of uploads as browsers show them on white: transparent keys, profiles, gamma; and files without their end."""

import io
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from shared import colour_profiles
from shared.contracts.common import ImageFormat
from shared.errors import InvalidImageError, UnsupportedImageTypeError
from shared.image_files import MAX_PROFILE_BYTES, MAX_SCANS
from shared.imaging import open_image
from tests.unit.test_imaging import decode, encoded, picture, pixels_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6


NOTHING: dict[str, bytes] = {}


def png(kind: int, depth: int, row: bytes, chunks: dict[str, bytes] = NOTHING, *, width: int = 1) -> bytes:
    """A PNG of one row. chunks: by name, before the pixels."""
    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *((name.encode(), body) for name, body in chunks.items())]
    parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def first_pixel(data: bytes) -> list[int]:
    return [int(value) for value in pixels_of(decode(data).data)[0, 0]]


def near(*colour: int) -> Any:
    return pytest.approx(list(colour), abs=1)


def icc(kind: str = "RGB ", gamma: float = 1.0, description: str = "sRGB but linear") -> bytes:
    """A profile with this exponent. Its description begins as that of sRGB does."""
    rgb = colour_profiles.build(colour_profiles.SRGB_PRIMARIES, (gamma,))
    assert rgb is not None
    curve = b"para" + bytes(8) + struct.pack(">i", round(gamma * 65536))
    text = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 2 * len(description), 28)
    text += description.encode("utf-16-be")
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = [(b"desc", text + bytes(-len(text) % 4)), (b"wtpt", white)]
    if kind == "GRAY":
        tags += [(b"kTRC", curve)]
    else:
        tags += [(rgb[at : at + 4], rgb[slice(*_place(rgb, at))]) for at in range(132, 132 + 72, 12)]
    head = bytearray(rgb[:128])
    head[16:20] = kind.encode()
    table, body, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, each in tags:
        table += name + struct.pack(">II", offset + len(body), len(each))
        body += each
    head[:4] = struct.pack(">I", offset + len(body))
    return bytes(head) + table + body


def _place(profile: bytes, at: int) -> tuple[int, int]:
    offset, size = struct.unpack(">II", profile[at + 4 : at + 12])
    return offset, offset + size


def iccp(profile: bytes) -> bytes:
    return b"profile\0\0" + zlib.compress(profile)


# --- transparency by key ------------------------------------------------------------------------------------------

WHITE = [255, 255, 255]


@pytest.mark.parametrize(
    ("kind", "depth", "key", "keyed", "other", "shown"),
    [
        (GREY, 16, "3039", "3039", "3038", [48] * 3),
        (RGB, 16, "123456789abc", "123456789abc", "123456789abd", [18, 86, 154]),
        (GREY, 4, "0005", "50", "60", [102] * 3),
        (GREY, 2, "0001", "40", "80", [170] * 3),
        (GREY, 1, "0001", "80", "00", [0] * 3),
        (GREY, 1, "0000", "00", "80", WHITE),
        (GREY, 8, "0024", "24", "25", [37] * 3),
        (RGB, 8, "001200340056", "123456", "123457", [18, 52, 87]),
        (GREY, 4, "fff5", "50", "60", [102] * 3),  # bits over the depth do not count
    ],
)
def test_a_pixel_of_the_transparent_colour_is_white_and_no_other(
    kind: int, depth: int, key: str, keyed: str, other: str, shown: list[int]
) -> None:
    chunk = {"tRNS": bytes.fromhex(key)}
    assert first_pixel(png(kind, depth, bytes.fromhex(keyed), chunk)) == WHITE
    assert first_pixel(png(kind, depth, bytes.fromhex(other), chunk)) == shown


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_palette_entry_is_blended_with_white(depth: int) -> None:
    chunks = {"PLTE": bytes([255, 0, 0, 0, 0, 255]), "tRNS": bytes([128])}
    assert first_pixel(png(PALETTE, depth, b"\0", chunks)) == near(255, 127, 127)
    assert first_pixel(png(PALETTE, depth, bytes([1 << (8 - depth)]), chunks)) == [0, 0, 255]


def test_grey_with_alpha_of_16_bits_is_blended_with_white() -> None:
    assert first_pixel(png(GREY_ALPHA, 16, bytes.fromhex("40008000"))) == near(159, 159, 159)


def test_orientation_is_applied_beside_a_key() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(
        GREY, 16, bytes.fromhex("30394000"), {"tRNS": bytes.fromhex("3039"), "eXIf": exif.tobytes()[6:]}, width=2
    )
    decoded = decode(data)
    assert (decoded.width, decoded.height) == (1, 2)
    assert pixels_of(decoded.data)[:, 0, 0].tolist() == [255, 64]


# --- profiles -----------------------------------------------------------------------------------------------------


def test_a_profile_counts_by_its_curve_and_not_by_its_description() -> None:
    data = png(RGB, 8, bytes([200, 134, 160]), {"iCCP": iccp(icc())})
    assert first_pixel(data) == near(229, 192, 208)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert first_pixel(png(RGB, 8, bytes([200, 134, 160]), {"iCCP": iccp(srgb)})) == [200, 134, 160]


@pytest.mark.parametrize(
    ("kind", "depth", "row", "extra"),
    [
        (GREY, 8, b"\x24", {}),
        (GREY_ALPHA, 8, b"\x24\xff", {}),
        (GREY_ALPHA, 16, b"\x24\x24\xff\xff", {}),
        (GREY, 8, b"\x24", {"tRNS": b"\0\0"}),
        (GREY, 16, b"\x24\x24", {"tRNS": b"\0\0"}),
    ],
)
def test_a_grey_profile_is_applied_also_beside_alpha_or_a_key(
    kind: int, depth: int, row: bytes, extra: dict[str, bytes]
) -> None:
    assert first_pixel(png(kind, depth, row, {"iCCP": iccp(icc("GRAY")), **extra})) == near(105, 105, 105)


def test_an_rgb_profile_is_applied_to_grey_and_a_grey_one_not_to_rgb() -> None:
    assert first_pixel(png(GREY, 8, b"\x24", {"iCCP": iccp(icc())})) == near(105, 105, 105)
    assert first_pixel(png(RGB, 8, bytes([36, 36, 36]), {"iCCP": iccp(icc("GRAY"))})) == [36, 36, 36]


LINEAR = struct.pack(">I", 100_000)
SRGB_POINTS = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_POINTS = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)


@pytest.mark.parametrize(
    ("chunks", "shown"),
    [
        ({"gAMA": LINEAR}, (229, 192, 208)),
        ({"gAMA": LINEAR, "cHRM": SRGB_POINTS}, (229, 192, 208)),
        ({"gAMA": LINEAR, "sRGB": b"\0"}, (200, 134, 160)),
        ({"gAMA": bytes(4)}, (200, 134, 160)),
        ({"gAMA": struct.pack(">I", 45455), "iCCP": iccp(icc())}, (229, 192, 208)),
        ({"gAMA": LINEAR, "cICP": bytes([1, 13, 0, 1])}, (200, 134, 160)),
        ({"cICP": bytes([1, 8, 0, 1]), "sRGB": b"\0"}, (229, 192, 208)),
        ({"cHRM": bytes(32)}, (200, 134, 160)),
    ],
)
def test_the_first_of_cicp_iccp_srgb_and_gama_counts(chunks: dict[str, bytes], shown: tuple[int, int, int]) -> None:
    assert first_pixel(png(RGB, 8, bytes([200, 134, 160]), chunks)) == near(*shown)


@pytest.mark.parametrize("chunk", [{"cHRM": P3_POINTS}, {"cICP": bytes([12, 13, 0, 1])}])
def test_wide_primaries_are_converted(chunk: dict[str, bytes]) -> None:
    # Display P3 (200, 100, 100) in sRGB, by the matrices of CSS Color 4.
    assert first_pixel(png(RGB, 8, bytes([200, 100, 100]), chunk)) == pytest.approx([214, 93, 97], abs=2)


def test_a_cmyk_jpeg_ignores_a_profile_of_rgb_kind_without_failing() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100, icc_profile=icc("GRAY"))
    assert first_pixel(data) == pytest.approx([255, 0, 0], abs=3)


def jpeg_of_four(samples: Sequence[int], *, adobe_transform: int | None, profile: bytes | None = None) -> bytes:
    """A JPEG that stores these samples in each pixel. adobe_transform: of its Adobe marker; None: it has none."""
    # Pillow stores inverted inks, as Adobe's programs do.
    image = Image.new("CMYK", (16, 16), tuple(255 - sample for sample in samples))
    data = encoded(image, "JPEG", quality=100, subsampling=0, **({} if profile is None else {"icc_profile": profile}))
    place = data.index(b"\xff\xee\0\x0eAdobe")
    marker = b"" if adobe_transform is None else data[place : place + 15] + bytes([adobe_transform])
    return data[:place] + marker + data[place + 16 :]


INKS = [30, 200, 120, 220]
"""Inverted: 255 means without ink."""
SHOWN = near(*(ink * INKS[3] // 255 for ink in INKS[:3]))


@pytest.mark.parametrize("adobe_transform", [0, None])
def test_a_cmyk_jpeg_stores_inverted_inks(adobe_transform: int | None) -> None:
    assert first_pixel(jpeg_of_four(INKS, adobe_transform=adobe_transform)) == SHOWN


def test_a_ycck_jpeg_stores_inverted_inks_as_luminance_and_colour() -> None:
    # libjpeg computes each stored ink as 255 minus the red, green or blue of YCbCr.
    pixel = Image.new("RGB", (1, 1), tuple(255 - ink for ink in INKS[:3])).convert("YCbCr").getpixel((0, 0))
    assert isinstance(pixel, tuple)
    assert first_pixel(jpeg_of_four([*pixel, INKS[3]], adobe_transform=2)) == pytest.approx(SHOWN.expected, abs=4)


def test_the_profile_of_a_cmyk_jpeg_is_applied_to_its_inks() -> None:
    lightness = {0: 100, 0b0001: 50}  # by the inks that are full, cyan first: only black is half as light
    corners = b"".join(bytes([lightness.get(inks, 0) * 255 // 100, 128, 128]) for inks in range(16))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
    table += ramp * 4 + corners + ramp * 3
    head = bytearray(icc()[:128])
    head[12:24] = b"prtrCMYKLab "
    profile = bytes(head) + struct.pack(">I4sII", 1, b"A2B0", 144, len(table)) + table
    profile = struct.pack(">I", len(profile)) + profile[4:]
    for samples, shown in (([255] * 4, WHITE), ([255, 255, 255, 0], [119] * 3), ([0, 255, 255, 255], [0] * 3)):
        data = jpeg_of_four(samples, adobe_transform=0, profile=profile)
        assert first_pixel(data) == pytest.approx(shown, abs=2)


@pytest.mark.parametrize(
    ("primaries", "curve", "shown"),
    [
        (1, 13, (200, 100, 100)),
        (2, 2, (200, 100, 100)),
        (12, 13, (214, 93, 97)),
        (12, 2, (214, 93, 97)),
        (1, 8, (229, 168, 168)),
        (1, 1, (200, 100, 100)),  # browsers show the curves of video as that of sRGB
        (12, 14, (214, 93, 97)),
        (12, 16, (200, 100, 100)),  # HDR
    ],
)
def test_the_coded_colours_of_an_avif_are_converted(primaries: int, curve: int, shown: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (16, 16), (200, 100, 100))
    options: dict[str, Any] = {"quality": 100, "subsampling": "4:4:4"}
    data = encoded(image, "AVIF", **options)
    place = data.index(b"nclx") + 4
    codes = struct.pack(">HH", primaries, curve)
    assert first_pixel(data[:place] + codes + data[place + 4 :]) == pytest.approx(shown, abs=3)
    with_profile = encoded(image, "AVIF", icc_profile=icc(gamma=2.2), **options)
    place = with_profile.index(b"nclx") + 4
    assert first_pixel(with_profile[:place] + codes + with_profile[place + 4 :]) == pytest.approx([200, 98, 98], abs=4)


def test_a_damaged_description_of_an_avif_is_an_invalid_image_or_an_image() -> None:
    data = encoded(Image.new("RGB", (16, 16), (200, 100, 100)), "AVIF")
    for place in range(data.index(b"mdat")):
        for value in (0, 1, 255):
            with suppress(InvalidImageError):
                decode(data[:place] + bytes([value]) + data[place + 1 :])


# --- formats ------------------------------------------------------------------------------------------------------


def test_an_animation_of_one_lossless_frame_stays_lossless() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 47, 4), dtype=np.uint8))
    still = encoded(noise, "WEBP", lossless=True)
    frame = next(chunk for name, chunk in _webp_chunks(still) if name == b"VP8L")
    body = b"VP8X" + struct.pack("<I", 10) + b"\x12\0\0\0" + _three(46) + _three(32)
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    inner = b"VP8L" + struct.pack("<I", len(frame)) + frame + bytes(len(frame) % 2)
    body += b"ANMF" + struct.pack("<I", 16 + len(inner)) + bytes(6) + _three(46) + _three(32) + bytes(4) + inner
    animated = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    assert np.array_equal(pixels_of(decode(animated).data), pixels_of(decode(still).data))


def _webp_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, offset = [], 12
    while offset < len(data):
        size = int.from_bytes(data[offset + 4 : offset + 8], "little")
        chunks.append((data[offset : offset + 4], data[offset + 8 : offset + 8 + size]))
        offset += 8 + size + size % 2
    return chunks


def _three(value: int) -> bytes:
    return value.to_bytes(3, "little")


def test_bytes_after_a_webp_are_dropped() -> None:
    assert b"<script>" not in decode(encoded(picture(), "WEBP") + b"<script>").data


def test_an_avif_is_stored_upright_as_webp() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 32, 32))
    decoded = decode(encoded(image, "AVIF", exif=exif, quality=95))
    assert (decoded.format, decoded.width, decoded.height) == (ImageFormat.WEBP, 32, 64)
    assert pixels_of(decoded.data)[10, 16].mean() < 30
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert first_pixel(encoded(clear, "AVIF")) == WHITE


def test_a_heic_is_refused_by_its_name() -> None:
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic"):
        with pytest.raises(UnsupportedImageTypeError, match="HEIC"):
            decode(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(100))


# --- the end of a file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}, {"restart_marker_blocks": 1}])
def test_a_jpeg_without_its_end_marker_is_accepted_when_it_is_whole(options: dict[str, Any]) -> None:
    data = encoded(picture(61, 43), "JPEG", **options)
    for missing in (1, 2):
        assert np.array_equal(pixels_of(decode(data[:-missing]).data), pixels_of(decode(data).data))
    for length in (len(data) - 3, len(data) - 12, len(data) * 2 // 3):
        with pytest.raises(InvalidImageError):
            decode(data[:length])


def test_a_png_without_its_end_chunk_is_accepted() -> None:
    data = encoded(picture(), "PNG")
    assert np.array_equal(pixels_of(decode(data[:-12]).data), pixels_of(data))


# --- missing pixels -----------------------------------------------------------------------------------------------

JPEG_END = b"\xff\xd9"
JPEG_OPTIONS: list[dict[str, Any]] = [
    {},
    {"optimize": True},
    {"progressive": True},
    {"subsampling": 2},
    {"restart_marker_blocks": 1},
]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(depth: int, kind: int, samples: bytes, *, size: tuple[int, int], interlaced: bool = False) -> bytes:
    """A PNG whose IDAT holds exactly these filtered rows, in two chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, int(interlaced)))
    pixels = zlib.compress(samples)
    palette = chunk(b"PLTE", bytes(6)) if kind == PALETTE else b""
    data = chunk(b"IDAT", pixels[:5]) + chunk(b"IDAT", pixels[5:])
    return b"\x89PNG\r\n\x1a\n" + header + palette + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "kind", "size", "interlaced", "needed"),
    [
        (8, RGB, (5, 3), False, 3 * (1 + 15)),
        (1, GREY, (9, 2), False, 2 * (1 + 2)),
        (2, PALETTE, (5, 2), False, 2 * (1 + 2)),
        (16, RGBA, (2, 2), False, 2 * (1 + 16)),
        (8, GREY_ALPHA, (3, 1), False, 1 + 6),
        # Adam7: the passes have 1x1, none, 1x1, 1x1, 2x1, 1x2 and 3x1 pixels.
        (8, GREY, (3, 3), True, (1 + 1) + (1 + 1) + 2 * (1 + 1) + (1 + 2) + (1 + 3)),
    ],
)
def test_a_png_with_too_few_rows_is_refused(
    depth: int, kind: int, size: tuple[int, int], interlaced: bool, needed: int
) -> None:
    whole = png_of(depth, kind, bytes(needed), size=size, interlaced=interlaced)
    assert decode(whole).width == size[0]
    for length in (0, 1, needed // 2, needed - 1):
        with pytest.raises(InvalidImageError):
            decode(png_of(depth, kind, bytes(length), size=size, interlaced=interlaced))


def test_an_interlaced_png_is_accepted_when_it_is_whole() -> None:
    for width in (7, 15, 23):
        for height in (7, 15, 23):
            needed = sum(
                -(-(height - y) // dy) * (1 + -(-(width - x) // dx))
                for x, y, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
            ) + (height // 2) * (1 + width)
            data = png_of(8, GREY, bytes(needed), size=(width, height), interlaced=True)
            assert decode(data).height == height
            with pytest.raises(InvalidImageError):
                decode(png_of(8, GREY, bytes(needed - 1), size=(width, height), interlaced=True))


def test_rows_after_a_chunk_of_another_kind_do_not_count() -> None:
    whole = png_of(8, GREY, bytes(range(20)) + bytes(400), size=(20, 20))
    second = whole.rindex(b"IDAT") - 4
    with pytest.raises(InvalidImageError):
        decode(whole[:second] + chunk(b"tEXt", b"Comment\0x") + whole[second:])


@pytest.mark.parametrize("options", JPEG_OPTIONS)
def test_a_cut_jpeg_with_an_end_marker_or_zeros_is_refused(options: dict[str, Any]) -> None:
    data = encoded(picture(61, 43), "JPEG", **options)
    start = data.rindex(b"\xff\xda") + 12
    for length in (start, (start + len(data)) // 2, len(data) - 12, len(data) - 4):
        for tail in (JPEG_END, bytes(100), bytes(100) + JPEG_END, bytes(len(data) - length), bytes(100_000)):
            with pytest.raises(InvalidImageError):
                decode(data[:length] + tail)


@pytest.mark.parametrize("options", JPEG_OPTIONS)
@pytest.mark.parametrize("colour", ["#808080", "white", "black", "#c81e28"])
def test_a_whole_flat_jpeg_is_accepted(options: dict[str, Any], colour: str) -> None:
    # The data of a flat picture may end with many zeros.
    for side in (8, 40, 61, 256):
        data = encoded(Image.new("RGB", (side, side), colour), "JPEG", **options)
        expected = pixels_of(decode(data).data)
        assert np.array_equal(pixels_of(data)[0, 0], pixels_of(data)[-1, -1])
        for other in (data[:-2], data + bytes(1000), data + b"more", data[:-2] + b"\xff" + data[-2:]):
            assert np.array_equal(pixels_of(decode(other).data), expected)


def test_a_whole_jpeg_with_zeros_in_place_of_its_end_is_accepted() -> None:
    data = encoded(picture(61, 43), "JPEG")
    assert np.array_equal(pixels_of(decode(data[:-2] + bytes(500)).data), pixels_of(decode(data).data))


def test_an_arithmetic_jpeg_may_leave_its_last_zeros_out() -> None:
    # ITU T.81, D.1.8: the encoder may drop the zeros at the end, so the missing bytes are no missing pixels.
    table = b"\xff\xdb\0\x43\0" + bytes([16]) * 64
    frame = b"\xff\xc9\0\x0b\x08\0\x40\0\x40\x01\x01\x11\0"
    decoded = decode(b"\xff\xd8" + table + frame + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + b"\x12" + JPEG_END)
    assert (decoded.width, decoded.height) == (64, 64)


# --- chunks that change nothing -----------------------------------------------------------------------------------


def with_chunk(data: bytes, name: bytes, body: bytes, *, late: bool) -> bytes:
    place = data.index(b"IEND") - 4 if late else 33
    return data[:place] + chunk(name, body) + data[place:]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"gAMA", LINEAR),
        (b"iCCP", iccp(icc())),
        (b"cICP", bytes([1, 8, 0, 1])),
        (b"tRNS", bytes.fromhex("00c8008600a0")),
        (b"tRNS", b""),
    ],
)
def test_a_chunk_of_colours_after_the_pixels_does_not_count(name: bytes, body: bytes) -> None:
    # https://www.w3.org/TR/png-3/#5ChunkOrdering
    data = png(RGB, 8, bytes([200, 134, 160]))
    assert first_pixel(with_chunk(data, name, body, late=True)) == [200, 134, 160]
    if body:
        assert first_pixel(with_chunk(data, name, body, late=False)) != [200, 134, 160]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000))),
        (b"zTXt", b"Comment\0\0broken"),
        (b"zTXt", b"Comment\0\x07"),
        (b"iTXt", b"Comment\0\x01\0\0\0" + zlib.compress(bytes(2_000_000))),
        (b"iTXt", b"Comment\0"),
        (b"tEXt", b"Comment\0" + bytes(2_000_000)),
        (b"tEXt", b""),
    ],
)
def test_a_text_in_a_png_never_refuses_it(name: bytes, body: bytes, late: bool) -> None:
    assert first_pixel(with_chunk(png(RGB, 8, bytes([1, 2, 3])), name, body, late=late)) == [1, 2, 3]


def test_many_long_texts_in_a_png_never_refuse_it() -> None:
    data = png(RGB, 8, bytes([1, 2, 3]))
    for _ in range(70):
        data = with_chunk(data, b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000)), late=False)
    assert first_pixel(data) == [1, 2, 3]


def test_a_profile_of_some_megabytes_is_applied_and_a_larger_one_ignored() -> None:
    profile = icc()
    for size, shown in ((3 * 2**20, near(229, 192, 208)), (MAX_PROFILE_BYTES + 1, [200, 134, 160])):
        long = struct.pack(">I", size) + profile[4:] + bytes(size - len(profile))
        assert first_pixel(png(RGB, 8, bytes([200, 134, 160]), {"iCCP": iccp(long)})) == shown


@pytest.mark.parametrize("chunk_body", [b"", b"profile", b"profile\0", b"profile\0\x01x", b"profile\0\0broken"])
def test_a_damaged_profile_chunk_is_ignored(chunk_body: bytes) -> None:
    assert first_pixel(png(RGB, 8, bytes([200, 134, 160]), {"iCCP": chunk_body})) == [200, 134, 160]


XMP_TURNED = b'<rdf:Description tiff:Orientation="6"/>'


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "AVIF", "PNG"])
@pytest.mark.parametrize("with_exif", [False, True])
def test_only_exif_turns_a_picture(image_format: str, with_exif: bool) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description, and no orientation"
    options: dict[str, Any] = {"exif": exif} if with_exif else {}
    if image_format == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP_TURNED.decode())
    else:
        options["xmp"] = XMP_TURNED
    decoded = decode(encoded(picture(60, 40), image_format, **options))
    assert (decoded.width, decoded.height) == (60, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    original = picture(6, 4)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(original, "PNG", exif=exif))))
    assert np.array_equal(pixels_of(decode(encoded(original, "PNG", exif=exif)).data), np.asarray(turned))


# --- work beyond the pixels ---------------------------------------------------------------------------------------


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes `count` times more."""
    data = encoded(picture(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (1 + count) + data[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_before_decoding() -> None:
    with pytest.raises(InvalidImageError, match=f"{MAX_SCANS} scans"):
        decode(with_scans(3000))
    assert decode(encoded(picture(), "JPEG", progressive=True)).width == 60


def test_a_file_of_empty_chunks_or_segments_is_refused_before_decoding() -> None:
    data = encoded(picture(), "PNG")
    chunk = struct.pack(">I", 0) + b"teST" + struct.pack(">I", zlib.crc32(b"teST"))
    with pytest.raises(InvalidImageError, match="chunks"):
        decode(data[:33] + chunk * 60_000 + data[33:])
    jpeg = encoded(picture(), "JPEG")
    with pytest.raises(InvalidImageError, match="segments"):
        decode(jpeg[:2] + b"\xff\xfe\0\2" * 60_000 + jpeg[2:])


def test_an_image_of_the_service_is_read_as_it_was_written() -> None:
    assert open_image(decode(png(RGB, 8, bytes([1, 2, 3]))).data).getpixel((0, 0)) == (1, 2, 3)
