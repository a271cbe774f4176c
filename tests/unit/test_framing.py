"""References and outputs keep their ratio, whatever size the model draws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from worker_service.models.generation import framing
from worker_service.models.generation.framing import Size

SIDES = st.integers(16, 2048)
SIZES = st.tuples(SIDES, SIDES)


def drawing(size: Size) -> Image.Image:
    """A circle in the first half of the longer side, a square in the second, on white."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    side = min(size)
    first, second = (side / 2, side / 2), (size[0] - side / 2, size[1] - side / 2)
    radius = side * 0.4
    draw.ellipse((first[0] - radius, first[1] - radius, first[0] + radius, first[1] + radius), fill="red")
    draw.rectangle((second[0] - radius, second[1] - radius, second[0] + radius, second[1] + radius), fill="blue")
    return image


def extent(pixels: np.ndarray, channel: int) -> tuple[float, float]:
    """Width and height of the red (0) or blue (2) shape."""
    others = [other for other in range(3) if other != channel]
    inside = (pixels[:, :, channel] > 128) & (pixels[:, :, others] < 128).all(axis=2)
    return float(inside.any(axis=0).sum()), float(inside.any(axis=1).sum())


@pytest.mark.parametrize("reference", [(96, 48), (48, 96), (300, 100)])
@pytest.mark.parametrize("requested", [(96, 48), (48, 96), (64, 64), (200, 150), (512, 171)])
@pytest.mark.parametrize("drawn", [(64, 64), (512, 512), (104, 48), (96, 144)])
def test_a_reference_is_whole_and_in_its_ratio_in_the_output(reference: Size, requested: Size, drawn: Size) -> None:
    # Four times the size, so that a pixel is a small share of a shape.
    requested, drawn, reference = ((4 * width, 4 * height) for width, height in (requested, drawn, reference))
    started = np.asarray(framing.initial_image(drawing(reference), drawn, requested))
    assert started.shape == (drawn[1], drawn[0], 3)
    output = framing.to_requested_size(started, requested)
    assert output.shape == (requested[1], requested[0], 3)
    circle, square = extent(output, 0), extent(output, 2)
    assert circle[0] == pytest.approx(circle[1], rel=0.05, abs=3)
    assert square[0] == pytest.approx(square[1], rel=0.05, abs=3)
    assert max(circle) == pytest.approx(max(square), rel=0.05, abs=3), "both are whole"


def test_a_reference_of_the_outputs_ratio_fills_it() -> None:
    started = np.asarray(framing.initial_image(Image.new("RGB", (96, 48), "red"), (64, 64), (96, 48)))
    assert (framing.to_requested_size(started, (96, 48)) == (255, 0, 0)).all()
    assert framing.placed_reference((96, 48), (64, 64), (96, 48)) == (0, 16, 64, 48)


def test_the_space_beside_a_reference_has_the_colours_of_its_edges() -> None:
    picture = Image.new("RGB", (40, 80), "red")
    picture.paste("blue", (20, 0, 40, 80))
    started = np.asarray(framing.initial_image(picture, (80, 80), (80, 80)))
    assert (started[40, 0] == (255, 0, 0)).all()
    assert (started[40, 79] == (0, 0, 255)).all()


@given(drawn=SIZES, requested=SIZES, reference=SIZES)
def test_the_visible_part_has_the_requested_ratio_and_contains_the_reference(
    drawn: Size, requested: Size, reference: Size
) -> None:
    left, top, right, bottom = framing.visible_part(drawn, requested)
    assert (right - left) * requested[1] == pytest.approx((bottom - top) * requested[0])
    assert left >= -1e-9
    assert right <= drawn[0] + 1e-9
    assert top >= -1e-9
    assert bottom <= drawn[1] + 1e-9
    assert min(drawn[0] - (right - left), drawn[1] - (bottom - top)) == pytest.approx(0, abs=1e-6), "the largest"
    x, y, end, low = framing.placed_reference(reference, drawn, requested)
    assert left - 1 <= x < end <= right + 1
    assert top - 1 <= y < low <= bottom + 1


def test_an_image_of_the_requested_ratio_is_only_scaled() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    assert (framing.to_requested_size(pixels, (96, 48)) == pixels).all()
    scaled = framing.to_requested_size(pixels, (192, 96))
    assert (scaled == np.asarray(Image.fromarray(pixels).resize((192, 96), Image.Resampling.LANCZOS))).all()


def test_a_preview_shows_the_part_that_stays_visible() -> None:
    preview = np.zeros((64, 64, 3), np.uint8)
    preview[16:48] = 255
    assert framing.to_requested_ratio(preview, (96, 48)).shape == (32, 64, 3)
    assert framing.to_requested_ratio(preview, (96, 48)).min() == 255
    assert framing.to_requested_ratio(preview, (2048, 16)).shape[0] == 1
