"""Applies the content policy to a job: blocks prompts, and blocks or blurs generated images."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from shared.contracts.safety import SafetyAction, SafetyDecision
from shared.errors import OutputBlockedError, PromptBlockedError
from shared.metrics import SAFETY_DECISIONS, increment_counter
from worker_service.jobs.attempt import Attempt
from worker_service.models.content_policy import Policy
from worker_service.models.generate_batch import GeneratedImage

logger = logging.getLogger(__name__)

MAX_BLUR_CELLS = 8
"""Cells of colour along the longer side of a blurred image, at most."""
MIN_CELL_PIXELS = 8
"""Pixels of a cell's side, at least, so that the original cannot be computed from the mean colours."""


def check_prompt(attempt: Attempt, policy: Policy) -> None:
    """Check the prompt and the texts of its concepts before they are used, and record the decisions.

    Raises:
        PromptBlockedError: the policy blocks the prompt.
    """
    if not policy.is_on:
        return
    parameters = attempt.parameters
    decisions = policy.decide_on_prompt(parameters.prompt, *(concept.text for concept in parameters.concepts))
    _record(attempt, policy, decisions)
    if any(decision.action is SafetyAction.BLOCK for decision in decisions):
        raise PromptBlockedError(concepts=_concepts(decisions))


def apply_policy(attempt: Attempt, images: Sequence[GeneratedImage], policy: Policy) -> list[GeneratedImage | None]:
    """Check the images, record the decisions, and return the images blurred where the policy says so.

    The result has None in the place of a blocked image. Every other image carries the decisions about it.

    Raises:
        OutputBlockedError: the policy blocks all images.
    """
    if not policy.is_on:
        return list(images)
    with attempt.stage("moderate"):
        by_image = policy.decide_on_images(images)
    decisions = [decision for of_image in by_image for decision in of_image]
    _record(attempt, policy, decisions)
    allowed = [_apply_actions(image, of_image) for image, of_image in zip(images, by_image, strict=True)]
    if all(image is None for image in allowed):
        raise OutputBlockedError(concepts=_concepts(decisions))
    return allowed


def _record(attempt: Attempt, policy: Policy, decisions: Sequence[SafetyDecision]) -> None:
    for decision in decisions:
        labels = decision.model_dump(mode="json", include={"concept", "stage", "action"})
        increment_counter(SAFETY_DECISIONS, labels=labels)
        logger.warning("safety_decision", extra={**labels, "index": decision.index, "similarity": decision.similarity})
    attempt.record_moderation(policy.digest, decisions)


def _apply_actions(image: GeneratedImage, decisions: Sequence[SafetyDecision]) -> GeneratedImage | None:
    actions = {decision.action for decision in decisions}
    if SafetyAction.BLOCK in actions:
        return None
    pixels = blurred(image.pixels) if SafetyAction.BLUR in actions else image.pixels
    return replace(image, pixels=pixels, decisions=tuple(decisions))


def blurred(pixels: np.ndarray) -> np.ndarray:
    """The image, reduced to a few mean colours: see `MAX_BLUR_CELLS`. uint8, shape (height, width, 3), RGB."""
    image = Image.fromarray(pixels)
    longest = max(image.size)
    cells = min(MAX_BLUR_CELLS, max(1, longest // MIN_CELL_PIXELS))
    small = image.resize(
        (max(1, image.width * cells // longest), max(1, image.height * cells // longest)), Image.Resampling.BOX
    )
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def _concepts(decisions: Sequence[SafetyDecision]) -> list[str]:
    return sorted({decision.concept for decision in decisions if decision.action is SafetyAction.BLOCK})
