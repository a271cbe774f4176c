"""The operator's content policy: which concepts a prompt or an image shows, as this worker's CLIP sees it."""

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
from worker_service.models.generate_batch import Drawn

WINDOW_WORDS, WINDOW_STRIDE = 4, 2

Embed = Callable[[Sequence[str] | Sequence[Image.Image]], np.ndarray]
"""Texts or images -> float32, shape (n, dim), not normalised; at least one of them."""


@dataclass(frozen=True)
class Concept:
    settings: ConceptSettings
    texts: np.ndarray
    """Shape (n, dim), float32, L2-normalised."""
    unless: np.ndarray
    """Shape (m, dim), float32, L2-normalised; m may be 0."""

    @classmethod
    def of(cls, settings: ConceptSettings, embed: Embed) -> Self:
        texts = unit(embed(settings.texts))
        unless = unit(embed(settings.unless)) if settings.unless else np.empty((0, texts.shape[1]), np.float32)
        return cls(settings, texts, unless)

    def similarity(self, vectors: np.ndarray) -> float:
        """The highest cosine of any of `vectors` to any text; -1 when each of them is nearer to an `unless`.

        vectors: shape (n, dim), float32, L2-normalised.
        """
        nearest = (vectors @ self.texts.T).max(axis=1)
        excused = (vectors @ self.unless.T).max(axis=1, initial=-1) > nearest
        return float(np.where(excused, -1, nearest).max())

    def decisions(
        self, rule: PromptRule | OutputRule, vectors: np.ndarray, stage: SafetyStage, index: int | None = None
    ) -> list[SafetyDecision]:
        """What follows from these vectors of one prompt or one image: one decision or none."""
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
    """What to look for and what to do about it. With nothing to look for it embeds nothing."""

    concepts: Sequence[Concept]
    checker: SafetyAction | None
    """What follows when the checker that the model brought objects; none: it brought none, or it is off."""
    embed: Embed

    @classmethod
    def of(cls, settings: SafetySettings, generator: GeneratorSettings, embed: Embed, *, has_checker: bool) -> Self:
        checker = SafetyAction(generator.safety_checker) if has_checker and generator.safety_checker != "off" else None
        return cls([Concept.of(each, embed) for each in settings.concepts], checker, embed)

    @property
    def is_on(self) -> bool:
        return bool(self.concepts) or self.checker is not None

    @property
    def withholds(self) -> bool:
        """Can it keep an image from being shown as it was drawn? Then nobody may see it being drawn either."""
        actions = [self.checker, *(each.settings.output.action for each in self.concepts if each.settings.output)]
        return any(action in (SafetyAction.BLUR, SafetyAction.BLOCK) for action in actions)

    @property
    def digest(self) -> str:
        """Equal where the rules are."""
        rules = [[each.settings.model_dump(mode="json") for each in self.concepts], self.checker]
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    def of_prompt(self, prompt: str) -> list[SafetyDecision]:
        """What is recognised in a prompt, or in any few words of it."""
        rules = [(each, each.settings.prompt) for each in self.concepts if each.settings.prompt]
        if not rules:
            return []
        vectors = unit(self.embed(parts_of_prompt(prompt)))
        return [found for concept, rule in rules for found in concept.decisions(rule, vectors, SafetyStage.PROMPT)]

    def of_images(self, images: Sequence[Drawn]) -> list[list[SafetyDecision]]:
        """What is recognised in each of the images of a job, and what its checker says of it."""
        found: list[list[SafetyDecision]] = [
            [SafetyDecision(concept=SAFETY_CHECKER, stage=SafetyStage.OUTPUT, action=self.checker, index=index)]
            if image.unsafe and self.checker is not None
            else []
            for index, image in enumerate(images)
        ]
        rules = [(each, each.settings.output) for each in self.concepts if each.settings.output]
        if rules:
            parts = [parts_of_image(image.pixels) for image in images]
            vectors = unit(self.embed([part for of_image in parts for part in of_image]))
            ends = list(accumulate(map(len, parts)))
            for index, seen in enumerate(np.split(vectors, ends[:-1])):
                for concept, rule in rules:
                    found[index] += concept.decisions(rule, seen, SafetyStage.OUTPUT, index)
        return found


def parts_of_prompt(prompt: str) -> list[str]:
    """The prompt, and every few words of it: one word among many hardly moves the vector of the whole, and CLIP reads
    no further than its context."""
    words = re.findall(r"\w+", prompt)
    starts = range(0, max(1, len(words) - WINDOW_STRIDE), WINDOW_STRIDE)
    windows = (" ".join(words[start : start + WINDOW_WORDS]) for start in starts)
    return list(dict.fromkeys([prompt, *filter(None, windows)]))


def parts_of_image(pixels: np.ndarray) -> list[Image.Image]:
    """Squares that overlap and cover the image, which is one itself or not: CLIP looks at the middle square alone.

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


def unit(vectors: np.ndarray) -> np.ndarray:
    """L2-normalised. vectors: shape (n, dim), none of them 0."""
    normalised: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalised
