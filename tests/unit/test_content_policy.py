"""What the content policy recognises, with a CLIP whose vectors are chosen by hand."""

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
from worker_service.models.generate_batch import Drawn

CHEAP = GeneratorSettings(kind="cheap")
DIRECTIONS = {"gun": 0.0, "pistol": 10.0, "water pistol": 25.0, "apple": 90.0}
"""In degrees; what is not here lies at 180."""


def embed(items: Sequence[str] | Sequence[Image.Image]) -> np.ndarray:
    """A text lies where the longest known words in it do, a picture at its reddest pixel; of any length."""
    angles = [_angle(item) if isinstance(item, str) else 180 - _reddest(item) for item in items]
    return np.array([[3 * math.cos(math.radians(a)), 3 * math.sin(math.radians(a))] for a in angles], np.float32)


def _angle(text: str) -> float:
    known = [words for words in DIRECTIONS if words in text]
    return DIRECTIONS[max(known, key=len)] if known else 180.0


def _reddest(picture: Image.Image) -> float:
    return float(np.asarray(picture)[..., 0].max()) * 180 / 255


def policy(*concepts: dict[str, Any], checker: str = "off") -> Policy:
    settings = SafetySettings.model_validate({"concepts": concepts})
    generator = GeneratorSettings.model_validate({"kind": "cheap", "safety_checker": checker})
    return Policy.of(settings, generator, embed, has_checker=True)


def weapon(**more: Any) -> dict[str, Any]:
    return {"name": "weapon", "texts": ["apple", "gun"], "prompt": {"threshold": 0.9, "action": "block"}, **more}


def drawn(red: int, *, width: int = 8, height: int = 8, at: int = 0, **more: Any) -> Drawn:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[at % height, at % width, 0] = red
    return Drawn(pixels, **more)


# --- prompts ------------------------------------------------------------------------------------------------------


def test_a_prompt_near_to_any_text_of_a_concept_is_recognised_with_similarity_and_threshold() -> None:
    decision = SafetyDecision(
        concept="weapon", stage=SafetyStage.PROMPT, action=SafetyAction.BLOCK, similarity=0.9848, threshold=0.9
    )
    assert policy(weapon()).of_prompt("a pistol") == [decision]
    assert policy(weapon()).of_prompt("a cloud") == []


def test_a_threshold_is_reached_by_an_equal_similarity() -> None:
    assert policy(weapon(prompt={"threshold": 1.0})).of_prompt("a gun")[0].action == "flag"


def test_what_is_nearer_to_something_harmless_does_not_count_unless_the_rest_of_the_prompt_does() -> None:
    harmless = policy(weapon(texts=["gun"], unless=["water pistol"]))
    assert harmless.of_prompt("a water pistol") == []
    assert harmless.of_prompt("a gun") != []
    assert harmless.of_prompt("one that holds a gun and shows beside it also a water pistol") != []


@pytest.mark.parametrize("words_before", range(9))
def test_a_word_is_found_wherever_it_stands_in_a_long_prompt(words_before: int) -> None:
    prompt = ", ".join(["very"] * words_before + ["(gun:1.4)"] + ["golden hour"] * 200)
    assert any("gun" in part.split() for part in parts_of_prompt(prompt)[1:])
    assert max(len(part.split()) for part in parts_of_prompt(prompt)[1:]) == 4


@pytest.mark.parametrize("prompt", ["gun", "a gun", "!!!", "a b c d e", "a " * 1000])
def test_the_prompt_itself_is_a_part_and_no_part_comes_twice(prompt: str) -> None:
    parts = parts_of_prompt(prompt)
    assert parts[0] == prompt
    assert len(set(parts)) == len(parts)
    assert all(part.strip() for part in parts)


# --- images -------------------------------------------------------------------------------------------------------


def test_each_image_gets_its_own_decisions_by_its_own_rules() -> None:
    rules = policy(weapon(texts=["gun"], output={"threshold": 0.9, "action": "blur"}))
    (none, one) = rules.of_images([drawn(0), drawn(255)])
    assert none == []
    assert [(each.index, each.stage, each.action) for each in one] == [(1, "output", "blur")]
    assert rules.of_prompt("a gun")[0].action == "block"


@pytest.mark.parametrize(("width", "height"), [(64, 8), (8, 64), (12, 8), (8, 9), (8, 8)])
def test_the_ends_of_a_long_image_are_looked_at_too(width: int, height: int) -> None:
    rules = policy(weapon(texts=["gun"], output={"threshold": 0.9}))
    for at in (0, max(width, height) // 2, max(width, height) - 1):
        (found,) = rules.of_images([drawn(255, width=width, height=height, at=at)])
        assert found, at
    parts = parts_of_image(np.zeros((height, width, 3), np.uint8))
    assert {part.size for part in parts} == {(8, 8)}


@pytest.mark.parametrize("action", ["flag", "blur", "block"])
def test_the_word_of_the_models_own_checker_is_a_decision_with_the_action_of_its_setting(action: str) -> None:
    (fine, unsafe) = policy(checker=action).of_images([drawn(0), drawn(0, unsafe=True)])
    assert fine == []
    assert [(each.concept, each.action, each.index) for each in unsafe] == [("safety_checker", action, 1)]


# --- as a whole ---------------------------------------------------------------------------------------------------


def test_without_concepts_and_checker_nothing_is_embedded_and_nothing_found() -> None:
    def refuse(items: object) -> np.ndarray:
        raise AssertionError(items)

    off = Policy.of(SafetySettings(), CHEAP, refuse, has_checker=False)
    assert not off.is_on
    assert off.of_prompt("a gun") == []
    assert off.of_images([drawn(255, unsafe=True)]) == [[]]


@pytest.mark.parametrize(
    ("rules", "checker", "withholds"),
    [
        ({}, "off", False),
        ({}, "flag", False),
        ({}, "blur", True),
        ({"output": {"threshold": 0, "action": "flag"}}, "off", False),
        ({"output": {"threshold": 0, "action": "blur"}}, "off", True),
        ({"output": {"threshold": 0, "action": "block"}}, "off", True),
    ],
)
def test_a_policy_withholds_when_it_can_blur_or_block_an_output(
    rules: dict[str, Any], checker: str, withholds: bool
) -> None:
    assert policy(weapon(**rules), checker=checker).withholds is withholds


def test_the_digest_tells_policies_apart_and_nothing_else() -> None:
    known = policy(weapon()).digest
    assert policy(weapon()).digest == known
    others = [policy(weapon(prompt={"threshold": 0.91})), policy(weapon(), checker="flag"), policy(weapon(name="w"))]
    assert len({known, *(each.digest for each in others)}) == 4


# --- blurring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(512, 512), (16, 16), (2048, 16), (16, 2048), (64, 48)])
def test_a_blurred_image_keeps_its_size_and_no_more_than_a_few_mean_colours(width: int, height: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    blot = max(width, height) // min(8, max(width, height) // 8)
    assert blot >= 8
    image = blurred(noise)
    assert image.shape == noise.shape
    assert image.dtype == np.uint8
    # Whatever has the same means becomes the same: turn every blot by half a turn.
    if width % blot == 0 and height % blot == 0:
        blocks = noise.reshape(height // blot, blot, width // blot, blot, 3)
        turned = blocks[:, ::-1, :, ::-1].reshape(noise.shape)
        assert (turned != noise).any()
        assert (blurred(turned) == image).all()


def test_a_blurred_image_shows_no_detail() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 255
    assert np.ptp(blurred(stripes)) <= 1
