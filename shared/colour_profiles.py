"""ICC profiles for pictures that describe their colours without one: PNG and AVIF.

Of the chunks of a PNG the first of these counts: `cICP`, `iCCP`, `sRGB`, `gAMA` with `cHRM`. Chromium does the same.
https://www.w3.org/TR/png-3/#color-space-priority. `gAMA` alone has the primaries of sRGB.
"""

import struct
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]

SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
BT709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
"""White, red, green and blue as x, y: the order of `cHRM`."""

# Code points of ITU-T H.273. HDR curves are left out: browsers map their tones each in its own way.
CODED_PRIMARIES = {
    1: SRGB_PRIMARIES,
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
CODED_CURVES: dict[int, tuple[float, ...]] = {
    1: BT709_CURVE,
    4: (2.2,),
    5: (2.8,),
    6: BT709_CURVE,
    8: (1.0,),
    13: SRGB_CURVE,
    14: BT709_CURVE,
    15: BT709_CURVE,
}
VIDEO_CURVES = (1, 6, 14, 15)
"""In an AVIF, Chromium reads these as the curve of sRGB (ui/gfx/color_space.cc), and so do most players of videos."""
BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))
D50 = (0.9642, 1.0, 0.8249)


def of_png(chunks: dict[bytes, bytes], embedded: bytes | None) -> bytes | None:
    """The profile of a PNG's pixels; None: they are in sRGB. embedded: the profile of its `iCCP` chunk."""
    coded = chunks.get(b"cICP", b"")
    if len(coded) == 4 and coded[0] in CODED_PRIMARIES and coded[1] in CODED_CURVES:
        return build(CODED_PRIMARIES[coded[0]], CODED_CURVES[coded[1]])
    if b"iCCP" in chunks or b"sRGB" in chunks:
        return embedded
    gamma, chromaticities = chunks.get(b"gAMA", b""), chunks.get(b"cHRM", b"")
    curve: tuple[float, ...] = SRGB_CURVE
    primaries: tuple[float, ...] = SRGB_PRIMARIES
    if len(gamma) == 4 and any(gamma):
        curve = (100_000 / int.from_bytes(gamma, "big"),)
    if len(chromaticities) == 32:
        primaries = tuple(value / 100_000 for value in struct.unpack(">8I", chromaticities))
    if (curve, primaries) == (SRGB_CURVE, SRGB_PRIMARIES):
        return None
    return build(primaries, curve)


def of_avif(codes: tuple[int, int] | None, embedded: bytes | None) -> bytes | None:
    """The profile of an AVIF's pixels; None: they are in sRGB. codes: of its primaries and its curve; 2: unspecified.

    An embedded profile counts more than the codes, as in browsers.
    """
    if embedded or codes is None:
        return embedded
    primaries = SRGB_PRIMARIES if codes[0] == 2 else CODED_PRIMARIES.get(codes[0])
    curve = SRGB_CURVE if codes[1] in (2, *VIDEO_CURVES) else CODED_CURVES.get(codes[1])
    if primaries is None or curve is None or (curve, primaries) == (SRGB_CURVE, SRGB_PRIMARIES):
        return None
    return build(primaries, curve)


def build(primaries: Sequence[float], curve: Sequence[float]) -> bytes | None:
    """An ICC profile of RGB; None when the primaries are those of no colour space.

    primaries: x and y of white, red, green and blue. curve: the exponent g, or g, a, b, c, d. The parametric curve is
    Y = (aX + b)^g for X >= d, else cX (ICC.1:2022, 10.18).
    """
    try:
        white, *points = [(x / y, 1.0, (1 - x - y) / y) for x, y in zip(primaries[::2], primaries[1::2], strict=True)]
        columns = _transposed(points)
        scales = _times(_inverse(columns), white)
        to_xyz = [[value * scale for value, scale in zip(row, scales, strict=True)] for row in columns]
        ratios = [d50 / own for d50, own in zip(_times(BRADFORD, D50), _times(BRADFORD, white), strict=True)]
        scaled = [[value * ratio for value in row] for row, ratio in zip(BRADFORD, ratios, strict=True)]
        adapted = [_times(_inverse(BRADFORD), _times(scaled, column)) for column in _transposed(to_xyz)]
        colorants = [_tag(b"XYZ ", column) for column in adapted]
        body = b"para" + bytes(4) + struct.pack(">HH", 0 if len(curve) == 1 else 3, 0) + _fixed(curve)
    except (ZeroDivisionError, struct.error):
        return None
    names = (b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC", b"wtpt")
    bodies = (*colorants, body, body, body, _tag(b"XYZ ", D50))
    table, blob, offset = struct.pack(">I", len(names)), b"", 132 + 12 * len(names)
    for name, each in zip(names, bodies, strict=True):
        table += name + struct.pack(">II", offset + len(blob), len(each))
        blob += each
    header = struct.pack(">I4sI4s4s4s", offset + len(blob), b"", 0x04200000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _fixed(D50)
    return header.ljust(128, b"\0") + table + blob


def _tag(kind: bytes, values: Sequence[float]) -> bytes:
    return kind + bytes(4) + _fixed(values)


def _fixed(values: Sequence[float]) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _transposed(matrix: Matrix) -> list[tuple[float, ...]]:
    return list(zip(*matrix, strict=True))


def _times(matrix: Matrix, vector: Sequence[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def _inverse(m: Matrix) -> list[list[float]]:
    (a, b, c), (d, e, f), (g, h, i) = m
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    cofactors = (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )
    return [[value / determinant for value in row] for row in cofactors]
