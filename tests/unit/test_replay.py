"""Comparison of a replay's image and record with the original."""

from typing import Any

import numpy as np
import pytest

from worker_service.jobs.replay import TOLERANCE_DB, changes, difference

GREY = np.full((8, 8, 3), 128, np.uint8)
RECORD: dict[str, Any] = {
    "seed": 1,
    "model": {"weights_digest": "aa", "dtype": "float32"},
    "versions": {"torch": "2.14.1"},
    "memory_savers": [],
    "references": [{"image_id": "x", "sha256": "s", "weight": 1.0, "caption": "a red apple", "pinned": False}],
    "mode_reason": "there were references",
    "job_id": "one",
}


def test_equal_pictures_have_no_difference() -> None:
    assert difference(GREY, GREY.copy()) == (0, None)


@pytest.mark.parametrize(("levels", "ratio"), [(1, 48.13), (2, 42.11), (255, 0.0)])
def test_a_uniform_difference_has_its_size_and_the_psnr_of_the_formula(levels: int, ratio: float) -> None:
    black = np.zeros_like(GREY)
    assert difference(black, black + np.uint8(levels)) == (levels, ratio)
    assert difference(black + np.uint8(levels), black) == (levels, ratio), "a darker pixel differs as much"


def test_one_very_different_pixel_in_a_small_picture_is_not_noise() -> None:
    spoiled = GREY.copy()
    spoiled[0, 0] = 255
    largest, ratio = difference(GREY, spoiled)
    assert largest == 127
    assert ratio is not None
    assert ratio < TOLERANCE_DB


def test_only_fields_that_decide_the_pixels_count_as_changed() -> None:
    reference = {**RECORD["references"][0], "pinned": True, "weight": 1.0000000000000002}
    assert (
        list(changes(RECORD, {**RECORD, "job_id": "two", "mode_reason": "asked for", "references": [reference]})) == []
    )
    later = {
        **RECORD,
        "versions": {"torch": "3.0", "diffusers": "1.0"},
        "safety": {"policy": "stricter", "decisions": []},
        "references": [{**reference, "caption": "a pear"}],
    }
    assert [(each.what, each.was, each.now) for each in changes(RECORD, later)] == [
        ("references.0.caption", "a red apple", "a pear"),
        ("safety.policy", None, "stricter"),
        ("versions.diffusers", None, "1.0"),
        ("versions.torch", "2.14.1", "3.0"),
    ]


def test_a_box_of_a_new_record_equals_the_stored_one() -> None:
    """A stored record has lists where a new one may have tuples."""
    stored = {**RECORD, "initial_image_box": [0, 4, 16, 12], "reference_call": {"sizes": [[8, 8]]}}
    new = {**RECORD, "initial_image_box": (0, 4, 16, 12), "reference_call": {"sizes": [(8, 8)]}}
    assert list(changes(stored, new)) == []
    moved = {**new, "initial_image_box": (0, 0, 16, 16)}
    assert [(each.what, each.was, each.now) for each in changes(stored, moved)] == [
        ("initial_image_box", [0, 4, 16, 12], [0, 0, 16, 16])
    ]


def test_digests_of_different_kinds_are_not_called_different_weights() -> None:
    by_files = {**RECORD, "model": {**RECORD["model"], "weights_digest": "bb", "weights_digest_kind": "files"}}
    assert [(each.what, each.was, each.now) for each in changes(RECORD, by_files)] == [
        ("model.weights_digest_kind", "tensors", "files")
    ]
    others = {**by_files, "model": {**by_files["model"], "weights_digest": "cc"}}
    assert [each.what for each in changes(by_files, others)] == ["model.weights_digest"]
