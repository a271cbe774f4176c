"""How the call of a pipeline takes guidance and negative prompts, from its signature and its configuration."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from diffusers import DiffusionPipeline

from worker_service.models.interface import ImageRequest

NO_NEGATIVE_PROMPT = " "
"""Negative prompt of a request without one, where true guidance needs one. It is that of the Qwen-Image model cards."""


@dataclass(frozen=True)
class Guidance:
    """The guidance of one class of pipelines.

    Most pipelines have one `guidance_scale`. Pipelines with a `true_cfg_scale` run the model twice only with a negative
    prompt. Some of their models, such as FLUX.1 dev, also have a distilled guidance, as `guidance_scale`. Requests then
    set that one, and have no negative prompt.
    """

    parameter: str | None
    """Parameter of the call that takes the scale; None if the model takes none."""
    default: float
    """Scale by the signature of the call; 0 without a parameter."""
    takes_negative_prompt: bool
    needs_negative_prompt: bool
    """Without a negative prompt, the scale has no effect."""
    takes_scale: bool
    """False for a model that was distilled to work without guidance. Its call gets a scale of 0, if it takes one."""

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> Self:
        """The guidance of this pipeline."""
        parameters = inspect.signature(type(pipeline).__call__).parameters
        denoiser = getattr(pipeline, "transformer", None)
        embedded = denoiser is not None and bool(denoiser.config.get("guidance_embeds"))
        true_guidance = "true_cfg_scale" in parameters and not embedded
        parameter = next(
            (name for name in ("true_cfg_scale" if true_guidance else "", "guidance_scale") if name in parameters), None
        )
        takes_scale = parameter is not None and not pipeline.config.get("is_distilled")
        scale = parameters[parameter].default if parameter is not None and takes_scale else None
        return cls(
            parameter=parameter,
            default=float(scale) if isinstance(scale, int | float) else 0.0,
            takes_negative_prompt="negative_prompt" in parameters
            and takes_scale
            and (true_guidance or "true_cfg_scale" not in parameters),
            needs_negative_prompt=true_guidance and takes_scale,
            takes_scale=takes_scale,
        )

    def arguments(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        """Arguments of the call for these requests, which have equal batch keys."""
        first = requests[0]
        arguments: dict[str, Any] = {}
        if self.parameter is not None:
            arguments[self.parameter] = first.guidance_scale if self.takes_scale else 0.0
        if first.negative_prompt or (self.needs_negative_prompt and first.guidance_scale > 1):
            arguments["negative_prompt"] = [request.negative_prompt or NO_NEGATIVE_PROMPT for request in requests]
        return arguments
