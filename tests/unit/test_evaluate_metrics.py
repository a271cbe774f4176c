"""The evaluation's measures, on vectors whose answers are known."""

import math

import numpy as np
import pytest
from PIL import Image

from scripts.evaluate import metrics
from scripts.evaluate.colours import colour_of

EAST, NORTH, WEST = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([-1.0, 0.0])
NORTHEAST = np.array([math.sqrt(0.5), math.sqrt(0.5)])
NO_VECTORS = np.zeros((0, 2))


def test_recall_counts_queries_whose_best_relevant_item_ranks_high_enough() -> None:
    similarities = np.array([[0.9, 0.5, 0.1], [0.2, 0.8, 0.5], [0.3, 0.2, 0.1]])
    relevant = np.array([[True, False, True], [False, False, True], [False, False, True]])
    ranks = metrics.best_relevant_ranks(similarities, relevant)
    assert ranks.tolist() == [0, 1, 2]
    assert metrics.recall_at(1, ranks) == pytest.approx(1 / 3)
    assert metrics.recall_at(2, ranks) == pytest.approx(2 / 3)
    assert metrics.mean_reciprocal_rank(ranks) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_a_query_without_relevant_items_is_an_error() -> None:
    with pytest.raises(ValueError, match="no relevant item"):
        metrics.best_relevant_ranks(np.zeros((1, 2)), np.array([[False, False]]))


def test_precision_is_the_share_of_relevant_items_among_the_first() -> None:
    similarities = np.array([[0.9, 0.8, 0.1, 0.0]])
    assert metrics.precision_at(2, similarities, np.array([[True, False, True, True]])) == 0.5


def test_the_rank_of_the_true_name_counts_the_names_at_least_as_similar() -> None:
    names = np.stack([EAST, NORTH, WEST])
    assert metrics.name_ranks(np.stack([EAST, NORTHEAST, WEST]), names, truth=0).tolist() == [0, 1, 2]


def test_equal_similarity_to_all_names_gives_the_last_rank() -> None:
    assert metrics.name_ranks(EAST[None], np.stack([EAST, EAST, EAST]), truth=1).tolist() == [2]


def test_the_similarity_to_other_images_is_their_mean_or_maximum() -> None:
    images, others = np.stack([EAST, NORTHEAST]), np.stack([EAST, NORTH])
    assert metrics.mean_similarity(images, others) == pytest.approx([0.5, math.sqrt(0.5)])
    assert metrics.max_similarity(images, others) == pytest.approx([1, math.sqrt(0.5)])


def test_without_other_images_there_is_no_similarity() -> None:
    assert np.isnan(metrics.mean_similarity(EAST[None], NO_VECTORS)).all()
    assert np.isnan(metrics.max_similarity(EAST[None], NO_VECTORS)).all()
    assert math.isnan(metrics.min_pixel_distance(Image.new("RGB", (4, 4)), []))


def test_the_pixel_distance_is_that_of_the_nearest_reference_of_any_size() -> None:
    black, white, grey = (Image.new("RGB", (8, 8), colour) for colour in ("black", "white", "#808080"))
    assert metrics.min_pixel_distance(white, [black]) == 1
    assert metrics.min_pixel_distance(white, [black, grey]) == pytest.approx(127 / 255)
    assert metrics.min_pixel_distance(white, [black, Image.new("RGB", (20, 20), "white")]) == 0


def test_diversity_is_0_for_copies_and_rises_with_difference() -> None:
    assert metrics.diversity(np.stack([EAST, EAST, EAST])) == pytest.approx(0)
    assert metrics.diversity(np.stack([EAST, NORTH])) == pytest.approx(1)
    assert metrics.diversity(np.stack([EAST, EAST, NORTH])) == pytest.approx(2 / 3)
    assert math.isnan(metrics.diversity(EAST[None]))


def test_the_psnr_of_a_difference_of_one_tenth_is_20_db() -> None:
    image = np.full((4, 4, 3), 0.5)
    assert metrics.psnr_db(image, image + 0.1) == pytest.approx(20)
    assert metrics.psnr_db(image, image) > 100


@pytest.mark.parametrize(("drawn", "name"), [("crimson", "red"), ("seagreen", "green"), ("gold", "yellow")])
def test_an_image_has_the_name_of_its_commonest_colour(drawn: str, name: str) -> None:
    image = Image.new("RGB", (10, 10), "white")
    image.paste(drawn, (2, 2, 7, 7))
    image.paste("blue", (0, 0, 2, 5))
    assert colour_of(np.asarray(image)) == name


def test_an_image_without_colours_has_no_commonest_one() -> None:
    assert colour_of(np.asarray(Image.new("RGB", (10, 10), "dimgray"))) is None
