"""The evaluation's measures, on vectors whose answers are known."""

import math

import numpy as np
import pytest
from PIL import Image

from scripts.evaluate import metrics

EAST, NORTH, WEST = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([-1.0, 0.0])
NORTHEAST = np.array([math.sqrt(0.5), math.sqrt(0.5)])
NONE = np.zeros((0, 2))


def test_recall_counts_queries_whose_best_right_item_is_near_enough() -> None:
    similarities = np.array([[0.9, 0.5, 0.1], [0.2, 0.8, 0.5], [0.3, 0.2, 0.1]])
    relevant = np.array([[True, False, True], [False, False, True], [False, False, True]])
    ranks = metrics.first_hits(similarities, relevant)
    assert ranks.tolist() == [0, 1, 2]
    assert metrics.recall_at(1, ranks) == pytest.approx(1 / 3)
    assert metrics.recall_at(2, ranks) == pytest.approx(2 / 3)
    assert metrics.mean_reciprocal_rank(ranks) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_a_query_that_nothing_answers_is_a_mistake_and_not_a_miss() -> None:
    with pytest.raises(ValueError, match="no relevant item"):
        metrics.first_hits(np.zeros((1, 2)), np.array([[False, False]]))


def test_precision_is_the_share_of_right_items_among_the_first() -> None:
    similarities = np.array([[0.9, 0.8, 0.1, 0.0]])
    assert metrics.precision_at(2, similarities, np.array([[True, False, True, True]])) == 0.5


def test_an_image_is_named_right_when_no_other_name_suits_it_better() -> None:
    names = np.stack([EAST, NORTH, WEST])
    assert metrics.named_ranks(np.stack([EAST, NORTHEAST, WEST]), names, truth=0).tolist() == [0, 1, 2]


def test_a_judge_that_sees_no_difference_names_nothing_right() -> None:
    assert metrics.named_ranks(EAST[None], np.stack([EAST, EAST, EAST]), truth=1).tolist() == [2]


def test_similarity_to_real_images_is_the_mean_and_to_copies_the_greatest() -> None:
    images, others = np.stack([EAST, NORTHEAST]), np.stack([EAST, NORTH])
    assert metrics.mean_similarity(images, others) == pytest.approx([0.5, math.sqrt(0.5)])
    assert metrics.greatest_similarity(images, others) == pytest.approx([1, math.sqrt(0.5)])


def test_without_anything_to_compare_with_there_is_no_similarity() -> None:
    assert np.isnan(metrics.mean_similarity(EAST[None], NONE)).all()
    assert np.isnan(metrics.greatest_similarity(EAST[None], NONE)).all()
    assert math.isnan(metrics.least_pixel_distance(Image.new("RGB", (4, 4)), []))


def test_pixel_distance_is_that_of_the_nearest_reference_whatever_its_size() -> None:
    black, white, grey = (Image.new("RGB", (8, 8), colour) for colour in ("black", "white", "#808080"))
    assert metrics.least_pixel_distance(white, [black]) == 1
    assert metrics.least_pixel_distance(white, [black, grey]) == pytest.approx(127 / 255)
    assert metrics.least_pixel_distance(white, [black, Image.new("RGB", (20, 20), "white")]) == 0


def test_diversity_is_none_for_copies_and_rises_with_difference() -> None:
    assert metrics.diversity(np.stack([EAST, EAST, EAST])) == pytest.approx(0)
    assert metrics.diversity(np.stack([EAST, NORTH])) == pytest.approx(1)
    assert metrics.diversity(np.stack([EAST, EAST, NORTH])) == pytest.approx(2 / 3)
    assert math.isnan(metrics.diversity(EAST[None]))


def test_psnr_of_a_tenth_off_everywhere_is_20_db() -> None:
    image = np.full((4, 4, 3), 0.5)
    assert metrics.psnr_db(image, image + 0.1) == pytest.approx(20)
    assert metrics.psnr_db(image, image) > 100
