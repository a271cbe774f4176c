"""A job under the content policy: may its prompt be drawn, and which of its images may be seen, and how?"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from shared.contracts.safety import SafetyAction, SafetyDecision
from shared.errors import OutputBlockedError, PromptBlockedError
from shared.metrics import increment_counter
from worker_service.jobs.attempt import Attempt
from worker_service.models.content_policy import Policy
from worker_service.models.generate_batch import Drawn

logger = logging.getLogger(__name__)

BLOTS = 8
"""A blurred image keeps the mean colours of at most so many parts along its longer side, each at least as many pixels
wide: nothing computes the rest from them."""


def admit(job: Attempt, policy: Policy) -> None:
    """Judge the prompt before anything is drawn from it.

    Raises:
        PromptBlockedError
    """
    if not policy.is_on:
        return
    decisions = policy.of_prompt(job.parameters.prompt)
    _tell(job, policy, decisions)
    if any(decision.action is SafetyAction.BLOCK for decision in decisions):
        raise PromptBlockedError(concepts=_concepts(decisions))


def fit_to_show(job: Attempt, drawn: Sequence[Drawn], policy: Policy) -> list[Drawn | None]:
    """The images as they may be seen, with the decisions on each; None in the place of a blocked one.

    Raises:
        OutputBlockedError: none of them may be seen.
    """
    if not policy.is_on:
        return list(drawn)
    with job.stage("moderate"):
        found = policy.of_images(drawn)
    decisions = [decision for of_image in found for decision in of_image]
    _tell(job, policy, decisions)
    shown = [_as_shown(image, of_image) for image, of_image in zip(drawn, found, strict=True)]
    if all(image is None for image in shown):
        raise OutputBlockedError(concepts=_concepts(decisions))
    return shown


def _tell(job: Attempt, policy: Policy, decisions: Sequence[SafetyDecision]) -> None:
    for decision in decisions:
        told = decision.model_dump(mode="json", include={"concept", "stage", "action"})
        increment_counter("safety_decisions_total", labels=told)
        logger.warning("safety_decision", extra={**told, "index": decision.index, "similarity": decision.similarity})
    job.moderated(policy.digest, decisions)


def _as_shown(image: Drawn, decisions: Sequence[SafetyDecision]) -> Drawn | None:
    actions = {decision.action for decision in decisions}
    if SafetyAction.BLOCK in actions:
        return None
    pixels = blurred(image.pixels) if SafetyAction.BLUR in actions else image.pixels
    return replace(image, pixels=pixels, decisions=tuple(decisions))


def blurred(pixels: np.ndarray) -> np.ndarray:
    """The image as a few blots of colour. pixels: uint8, shape (height, width, 3), RGB."""
    image = Image.fromarray(pixels)
    longest = max(image.size)
    blots = min(BLOTS, max(1, longest // BLOTS))
    small = image.resize(
        (max(1, image.width * blots // longest), max(1, image.height * blots // longest)), Image.Resampling.BOX
    )
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def _concepts(decisions: Sequence[SafetyDecision]) -> list[str]:
    return sorted({decision.concept for decision in decisions if decision.action is SafetyAction.BLOCK})
