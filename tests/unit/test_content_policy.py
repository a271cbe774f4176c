"""The decisions of the content policy, with CLIP vectors chosen by hand."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.contracts.safety import SafetyAction, SafetyDecision, SafetyStage
from shared.settings import GeneratorSettings, SafetySettings
from worker_service.jobs.moderation import blurred
from worker_service.models.content_policy import Policy, parts_of_image, parts_of_prompt
from worker_service.models.generate_batch import GeneratedImage

FAKE = GeneratorSettings(kind="fake")
DIRECTIONS = {"gun": 0.0, "pistol": 10.0, "water pistol": 25.0, "apple": 90.0}
"""The angle of each known text in degrees. Every other text has the angle 180."""


def embed(items: Sequence[str] | Sequence[Image.Image]) -> np.ndarray:
    """Vectors of length 3, shape (n, 2), float32. The angle is that of the longest known text or the reddest pixel."""
    angles = [_angle(item) if isinstance(item, str) else 180 - _reddest(item) for item in items]
    return np.array([[3 * math.cos(math.radians(a)), 3 * math.sin(math.radians(a))] for a in angles], np.float32)


def _angle(text: str) -> float:
    known = [words for words in DIRECTIONS if words in text]
    return DIRECTIONS[max(known, key=len)] if known else 180.0


def _reddest(picture: Image.Image) -> float:
    return float(np.asarray(picture)[..., 0].max()) * 180 / 255


def policy(*concepts: dict[str, Any], checker: str = "off") -> Policy:
    settings = SafetySettings.model_validate({"concepts": concepts})
    generator = GeneratorSettings.model_validate({"kind": "fake", "safety_checker": checker})
    return Policy.of(settings, generator, embed, has_checker=True)


def weapon(**more: Any) -> dict[str, Any]:
    return {"name": "weapon", "texts": ["apple", "gun"], "prompt": {"threshold": 0.9, "action": "block"}, **more}


def generated(red: int, *, width: int = 8, height: int = 8, at: int = 0, **more: Any) -> GeneratedImage:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[at % height, at % width, 0] = red
    return GeneratedImage(pixels, **more)


# --- prompts ------------------------------------------------------------------------------------------------------


def test_a_prompt_near_any_text_of_a_concept_is_recognised_with_its_similarity() -> None:
    decision = SafetyDecision(
        concept="weapon", stage=SafetyStage.PROMPT, action=SafetyAction.BLOCK, similarity=0.9848, threshold=0.9
    )
    assert policy(weapon()).decide_on_prompt("a pistol") == [decision]
    assert policy(weapon()).decide_on_prompt("a cloud") == []


def test_a_similarity_equal_to_the_threshold_reaches_it() -> None:
    assert policy(weapon(prompt={"threshold": 1.0})).decide_on_prompt("a gun")[0].action == "flag"


def test_an_unless_text_excuses_only_the_part_of_the_prompt_near_it() -> None:
    harmless = policy(weapon(texts=["gun"], unless=["water pistol"]))
    assert harmless.decide_on_prompt("a water pistol") == []
    assert harmless.decide_on_prompt("a gun") != []
    assert harmless.decide_on_prompt("one that holds a gun and shows beside it also a water pistol") != []


@pytest.mark.parametrize("words_before", range(9))
def test_a_word_is_found_at_any_position_of_a_long_prompt(words_before: int) -> None:
    prompt = ", ".join(["very"] * words_before + ["(gun:1.4)"] + ["golden hour"] * 200)
    assert any("gun" in part.split() for part in parts_of_prompt(prompt)[1:])
    assert max(len(part.split()) for part in parts_of_prompt(prompt)[1:]) == 4


@pytest.mark.parametrize("prompt", ["gun", "a gun", "!!!", "a b c d e", "a " * 1000])
def test_the_whole_prompt_is_a_part_and_no_part_is_repeated(prompt: str) -> None:
    parts = parts_of_prompt(prompt)
    assert parts[0] == prompt
    assert len(set(parts)) == len(parts)
    assert all(part.strip() for part in parts)


# --- images -------------------------------------------------------------------------------------------------------


def test_each_image_gets_its_own_decisions_by_the_output_rules() -> None:
    rules = policy(weapon(texts=["gun"], output={"threshold": 0.9, "action": "blur"}))
    (first, second) = rules.decide_on_images([generated(0), generated(255)])
    assert first == []
    assert [(each.index, each.stage, each.action) for each in second] == [(1, "output", "blur")]
    assert rules.decide_on_prompt("a gun")[0].action == "block"


@pytest.mark.parametrize(("width", "height"), [(64, 8), (8, 64), (12, 8), (8, 9), (8, 8)])
def test_the_ends_of_a_long_image_are_checked_too(width: int, height: int) -> None:
    rules = policy(weapon(texts=["gun"], output={"threshold": 0.9}))
    for at in (0, max(width, height) // 2, max(width, height) - 1):
        (found,) = rules.decide_on_images([generated(255, width=width, height=height, at=at)])
        assert found, at
    parts = parts_of_image(np.zeros((height, width, 3), np.uint8))
    assert {part.size for part in parts} == {(8, 8)}


@pytest.mark.parametrize("action", ["flag", "blur", "block"])
def test_the_models_safety_checker_gives_a_decision_with_the_configured_action(action: str) -> None:
    (fine, unsafe) = policy(checker=action).decide_on_images([generated(0), generated(0, unsafe=True)])
    assert fine == []
    assert [(each.concept, each.action, each.index) for each in unsafe] == [("safety_checker", action, 1)]


# --- the policy as a whole ----------------------------------------------------------------------------------------


def test_without_concepts_and_checker_nothing_is_embedded_or_found() -> None:
    def refuse(items: object) -> np.ndarray:
        raise AssertionError(items)

    off = Policy.of(SafetySettings(), FAKE, refuse, has_checker=False)
    assert not off.is_on
    assert off.decide_on_prompt("a gun") == []
    assert off.decide_on_images([generated(255, unsafe=True)]) == [[]]


@pytest.mark.parametrize(
    ("rules", "checker", "can_change_images"),
    [
        ({}, "off", False),
        ({}, "flag", False),
        ({}, "blur", True),
        ({"output": {"threshold": 0, "action": "flag"}}, "off", False),
        ({"output": {"threshold": 0, "action": "blur"}}, "off", True),
        ({"output": {"threshold": 0, "action": "block"}}, "off", True),
    ],
)
def test_only_a_policy_that_blurs_or_blocks_outputs_can_change_images(
    rules: dict[str, Any], checker: str, can_change_images: bool
) -> None:
    assert policy(weapon(**rules), checker=checker).can_change_images is can_change_images


def test_digests_are_equal_exactly_for_equal_policies() -> None:
    known = policy(weapon()).digest
    assert policy(weapon()).digest == known
    others = [policy(weapon(prompt={"threshold": 0.91})), policy(weapon(), checker="flag"), policy(weapon(name="w"))]
    assert len({known, *(each.digest for each in others)}) == 4


# --- blurring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(512, 512), (16, 16), (2048, 16), (16, 2048), (64, 48)])
def test_a_blurred_image_keeps_only_its_size_and_a_few_mean_colours(width: int, height: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    cell = max(width, height) // min(8, max(width, height) // 8)
    assert cell >= 8
    image = blurred(noise)
    assert image.shape == noise.shape
    assert image.dtype == np.uint8
    # Images with the same mean colours give the same blurred image: turn every cell by 180 degrees.
    if width % cell == 0 and height % cell == 0:
        blocks = noise.reshape(height // cell, cell, width // cell, cell, 3)
        turned = blocks[:, ::-1, :, ::-1].reshape(noise.shape)
        assert (turned != noise).any()
        assert (blurred(turned) == image).all()


def test_a_blurred_image_shows_no_detail() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 255
    assert np.ptp(blurred(stripes)) <= 1
