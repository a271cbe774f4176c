"""The safety checker that a pipeline may bring, taken out of its calls: there it would paint over what it objects to,
and what is to follow is the operator's choice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image


@dataclass
class SafetyChecker:
    """Stable Diffusion's, of diffusers, with the preprocessing that the model brings for it."""

    model: torch.nn.Module
    preprocess: Any

    @classmethod
    def taken_from(cls, *pipelines: DiffusionPipeline | None) -> Self | None:
        """The checker of pipelines that share their parts, which have it no more; None if they have none."""
        checker = None
        for pipeline in pipelines:
            if pipeline is not None and getattr(pipeline, "safety_checker", None) is not None:
                checker = cls(pipeline.safety_checker, pipeline.feature_extractor)
                pipeline.safety_checker = None
        return checker

    @torch.no_grad()
    def objects_to(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Its word on each image. images: uint8, shape (height, width, 3), RGB."""
        pixels = self.preprocess([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
        parameter = next(self.model.parameters())
        # It wants the images too, to paint them black.
        sacrificed = np.zeros((len(images), 1, 1, 3))
        _, objections = self.model(clip_input=pixels.to(parameter.device, parameter.dtype), images=sacrificed)
        return [bool(objection) for objection in objections]
