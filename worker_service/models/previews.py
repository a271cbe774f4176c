"""Small pictures of unfinished images: what the scheduler expects the end to be, decoded at a fraction of the cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch.nn import functional

from shared.errors import ModelOutOfMemoryError
from worker_service.execution import accelerator
from worker_service.models.interface import PREVIEW_SIDE, ImageRequest


@dataclass
class Sight:
    """Looks into one call of a pipeline. It reads only: the images are those of a call that nobody looks into."""

    pipeline: DiffusionPipeline
    width: int
    height: int
    predicted: torch.Tensor | None = None
    """The clean latents that the last step headed for, where the scheduler tells."""
    blind: bool = False
    """There is no memory to spare for looking."""

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, requests: Sequence[ImageRequest]) -> Self | None:
        """For a pipeline with its scheduler in place; None when nobody looks, or nothing could be shown."""
        if all(request.onlooker is None for request in requests):
            return None
        config = getattr(getattr(pipeline, "vae", None), "config", {})
        if config.get("scaling_factor") is None:
            return None
        sight = cls(pipeline, requests[0].width, requests[0].height)
        sight.follow(pipeline.scheduler)
        return sight

    def pictures(self, latents: torch.Tensor, rows: Sequence[int]) -> list[np.ndarray]:
        """One picture per row, uint8 (height, width, 3), no side over PREVIEW_SIDE; none where it cannot be had."""
        if self.blind:
            return []
        seen = self.predicted if self.predicted is not None and self.predicted.shape == latents.shape else latents
        seen = seen[list(rows)]
        if seen.ndim == 3 and hasattr(self.pipeline, "_unpack_latents"):
            seen = self.pipeline._unpack_latents(seen, self.height, self.width, self.pipeline.vae_scale_factor)
        if seen.ndim != 4:
            return []
        try:
            pixels = accelerator.run_on(seen.device, lambda: self._decoded(seen), items=len(rows))
        except ModelOutOfMemoryError:
            self.blind = True
            return []
        if not np.isfinite(pixels).all():
            return []
        return list((pixels * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))

    def _decoded(self, latents: torch.Tensor) -> np.ndarray:
        """Float32 in [0, 1], shape (n, 3, height, width): of latents made small first, so it costs little."""
        vae = self.pipeline.vae
        largest = max(1, PREVIEW_SIDE // self.pipeline.vae_scale_factor)
        height, width = latents.shape[-2:]
        if max(height, width) > largest:
            scale = largest / max(height, width)
            size = (max(1, int(height * scale)), max(1, int(width * scale)))
            latents = functional.interpolate(latents.float(), size=size, mode="area")
        config = vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            latents = latents * latents.new_tensor(std).view(1, -1, 1, 1)
            latents = latents / config.scaling_factor + latents.new_tensor(mean).view(1, -1, 1, 1)
        else:
            latents = latents / config.scaling_factor + (config.get("shift_factor") or 0)
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        pixels: np.ndarray = (decoded.float() / 2 + 0.5).clamp(0, 1).cpu().numpy()
        return pixels

    def follow(self, scheduler: SchedulerMixin) -> None:
        """Note what each step predicts. The scheduler serves this one call only, so nothing has to be undone."""
        step: Callable[..., Any] = scheduler.step

        @wraps(step)  # pipelines ask the signature whether a step takes a generator
        def followed(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = step(model_output, *args, **kwargs)
            self.predicted = _predicted(scheduler, model_output, result)
            return result

        scheduler.step = followed


def _predicted(scheduler: SchedulerMixin, model_output: torch.Tensor, result: Any) -> torch.Tensor | None:
    """The clean latents behind a step: given back by it, kept by it, or the end of its straight line."""
    if isinstance(result, tuple) and len(result) > 1 and isinstance(result[1], torch.Tensor):
        return result[1]
    keeps = scheduler.config.get("predict_x0") or str(scheduler.config.get("algorithm_type")).endswith("++")
    if keeps and getattr(scheduler, "model_outputs", None):
        kept: torch.Tensor | None = scheduler.model_outputs[-1]
        return kept
    if hasattr(scheduler, "scale_noise") and isinstance(result, tuple):  # flow matching
        end: torch.Tensor = result[0] - scheduler.sigmas[scheduler.step_index] * model_output
        return end
    return None
