"""The operator's content policy: uses CLIP to find the concepts of the settings in prompts and images."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np
from PIL import Image

from shared.contracts.safety import SafetyAction, SafetyDecision, SafetyStage
from shared.settings import SAFETY_CHECKER, ConceptSettings, GeneratorSettings, OutputRule, PromptRule, SafetySettings
from shared.vectors import l2_normalised
from worker_service.models.generate_batch import GeneratedImage

WINDOW_WORDS, WINDOW_STRIDE = 4, 2
"""Words of a part of a prompt, and words between the starts of two parts."""

Embed = Callable[[Sequence[str] | Sequence[Image.Image]], np.ndarray]
"""Embeds one or more texts or images: float32, shape (n, dim), not normalised."""


@dataclass(frozen=True)
class Concept:
    """A concept of the policy, with the vectors of its texts."""

    settings: ConceptSettings
    text_vectors: np.ndarray
    """Of `settings.texts`: shape (n, dim), float32, L2-normalised."""
    exception_vectors: np.ndarray
    """Of `settings.unless`: shape (m, dim), float32, L2-normalised; m may be 0."""

    @classmethod
    def of(cls, settings: ConceptSettings, embed: Embed) -> Self:
        """Embed the texts of a concept."""
        text_vectors = l2_normalised(embed(settings.texts))
        if settings.unless:
            return cls(settings, text_vectors, l2_normalised(embed(settings.unless)))
        return cls(settings, text_vectors, np.empty((0, text_vectors.shape[1]), np.float32))

    def similarity(self, vectors: np.ndarray) -> float:
        """Highest cosine of one of `vectors` to one of the texts, in [-1, 1].

        A vector that is nearer to an exception than to every text counts as -1.
        vectors: shape (n, dim), float32, L2-normalised.
        """
        nearest_text = (vectors @ self.text_vectors.T).max(axis=1)
        nearest_exception = (vectors @ self.exception_vectors.T).max(axis=1, initial=-1)
        return float(np.where(nearest_exception > nearest_text, -1, nearest_text).max())

    def decisions(
        self, rule: PromptRule | OutputRule, vectors: np.ndarray, stage: SafetyStage, index: int | None = None
    ) -> list[SafetyDecision]:
        """The decision about one prompt or one image, in a list; an empty list below the rule's threshold.

        vectors: of the parts of the prompt or image, shape (n, dim), float32, L2-normalised. index: of the image.
        """
        similarity = self.similarity(vectors)
        if similarity < rule.threshold:
            return []
        return [
            SafetyDecision(
                concept=self.settings.name,
                stage=stage,
                action=SafetyAction(rule.action),
                index=index,
                similarity=round(similarity, 4),
                threshold=rule.threshold,
            )
        ]


@dataclass(frozen=True)
class Policy:
    """The concepts of the settings and their actions. Without concepts it embeds nothing."""

    concepts: Sequence[Concept]
    checker: SafetyAction | None
    """Action on an image that the model's safety checker finds unsafe; None without a checker that is switched on."""
    embed: Embed

    @classmethod
    def of(cls, settings: SafetySettings, generator: GeneratorSettings, embed: Embed, *, has_checker: bool) -> Self:
        """Build the policy of the settings. has_checker: the model includes a safety checker."""
        checker = SafetyAction(generator.safety_checker) if has_checker and generator.safety_checker != "off" else None
        return cls([Concept.of(each, embed) for each in settings.concepts], checker, embed)

    @property
    def is_on(self) -> bool:
        """Whether the policy has a concept or a checker."""
        return bool(self.concepts) or self.checker is not None

    @property
    def can_change_images(self) -> bool:
        """Whether the policy can blur or block an image. Then the job must not show previews either."""
        actions = [self.checker, *(each.settings.output.action for each in self.concepts if each.settings.output)]
        return any(action in (SafetyAction.BLUR, SafetyAction.BLOCK) for action in actions)

    @property
    def digest(self) -> str:
        """sha256 of the rules: equal for equal rules."""
        rules = [[each.settings.model_dump(mode="json") for each in self.concepts], self.checker]
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    def decide_on_prompt(self, *texts: str) -> list[SafetyDecision]:
        """Decisions about a prompt: one per concept that is found in it or in a few words of it.

        texts: the prompt, and other texts of the request by which references are searched.
        """
        rules = [(each, each.settings.prompt) for each in self.concepts if each.settings.prompt]
        if not rules:
            return []
        parts = dict.fromkeys(part for text in texts for part in parts_of_prompt(text))
        vectors = l2_normalised(self.embed(list(parts)))
        return [each for concept, rule in rules for each in concept.decisions(rule, vectors, SafetyStage.PROMPT)]

    def decide_on_images(self, images: Sequence[GeneratedImage]) -> list[list[SafetyDecision]]:
        """Decisions about each image of a job, by its concepts and by the model's safety checker."""
        decisions: list[list[SafetyDecision]] = [
            [SafetyDecision(concept=SAFETY_CHECKER, stage=SafetyStage.OUTPUT, action=self.checker, index=index)]
            if image.unsafe and self.checker is not None
            else []
            for index, image in enumerate(images)
        ]
        rules = [(each, each.settings.output) for each in self.concepts if each.settings.output]
        if rules:
            parts = [parts_of_image(image.pixels) for image in images]
            vectors = l2_normalised(self.embed([part for of_image in parts for part in of_image]))
            ends = list(accumulate(map(len, parts)))
            for index, vectors_of_image in enumerate(np.split(vectors, ends[:-1])):
                for concept, rule in rules:
                    decisions[index] += concept.decisions(rule, vectors_of_image, SafetyStage.OUTPUT, index)
        return decisions


def parts_of_prompt(prompt: str) -> list[str]:
    """The prompt, then overlapping windows of `WINDOW_WORDS` of its words, without duplicates.

    One word among many hardly changes the vector of a whole prompt, and a long prompt is only the mean of its parts.
    """
    words = re.findall(r"\w+", prompt)
    starts = range(0, max(1, len(words) - WINDOW_STRIDE), WINDOW_STRIDE)
    windows = (" ".join(words[start : start + WINDOW_WORDS]) for start in starts)
    return list(dict.fromkeys([prompt, *filter(None, windows)]))


def parts_of_image(pixels: np.ndarray) -> list[Image.Image]:
    """Overlapping squares that cover the image, because CLIP looks only at the middle square of an image.

    pixels: uint8, shape (height, width, 3), RGB.
    """
    image = Image.fromarray(pixels)
    side, longest = min(image.size), max(image.size)
    if side == longest:
        return [image]
    count = math.ceil(longest / side) + 1
    starts = [round(step * (longest - side) / (count - 1)) for step in range(count)]
    boxes = [
        (0, start, side, start + side) if image.width == side else (start, 0, start + side, side) for start in starts
    ]
    return [image.crop(box) for box in boxes]
