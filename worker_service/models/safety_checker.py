"""The safety checker that some pipelines include.

Inside of the pipeline it would paint unsafe images black. It is detached, so that the operator chooses the action.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image


@dataclass
class SafetyChecker:
    """Stable Diffusion's safety checker (`StableDiffusionSafetyChecker` of diffusers), with its preprocessing."""

    model: torch.nn.Module
    preprocess: Any

    @classmethod
    def detach_from(cls, *pipelines: DiffusionPipeline | None) -> Self | None:
        """Remove the checker from pipelines that share their parts, and return it; None if they include no checker."""
        checker = None
        for pipeline in pipelines:
            if pipeline is not None and getattr(pipeline, "safety_checker", None) is not None:
                checker = cls(pipeline.safety_checker, pipeline.feature_extractor)
                pipeline.safety_checker = None
        return checker

    @torch.no_grad()
    def detect_unsafe(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Whether each image is unsafe. images: uint8, shape (height, width, 3), RGB."""
        pixels = self.preprocess([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
        parameter = next(self.model.parameters())
        # The model paints unsafe images black in place, so it gets placeholders.
        placeholders = np.zeros((len(images), 1, 1, 3))
        _, unsafe = self.model(clip_input=pixels.to(parameter.device, parameter.dtype), images=placeholders)
        return [bool(each) for each in unsafe]
