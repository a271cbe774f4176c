"""Previews of unfinished images: the clean latents that the scheduler predicts, made small and then decoded."""

import inspect
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


def on_white(images: np.ndarray) -> np.ndarray:
    """Composite transparent images on white: shape (..., 4), float, in [0, 1]; the result has the shape (..., 3)."""
    composited: np.ndarray = images[..., :3] * images[..., 3:] + (1 - images[..., 3:])
    return composited


@dataclass
class Previewer:
    """Makes previews of one call of a pipeline. It changes nothing, so the images are the same as without previews."""

    pipeline: DiffusionPipeline
    width: int
    """Pixels of the images, with `height`."""
    height: int
    predicted: torch.Tensor | None = None
    """Clean latents that the last step predicted; None where the scheduler gives no prediction."""
    disabled: bool = False
    """Set when a preview did not fit in memory."""

    @classmethod
    def of(cls, pipeline: DiffusionPipeline, requests: Sequence[ImageRequest]) -> Self | None:
        """Make a previewer for one call of this pipeline, whose scheduler is already set.

        None when no request has a listener, or when the pipeline's latents cannot be decoded cheaply.
        """
        if all(request.preview_listener is None for request in requests):
            return None
        vae = getattr(pipeline, "vae", None)
        config = getattr(vae, "config", {})
        if config.get("scaling_factor") is None and config.get("latents_mean") is None and not hasattr(vae, "bn"):
            return None
        previewer = cls(pipeline, requests[0].width, requests[0].height)
        previewer.record_predictions(pipeline.scheduler)
        return previewer

    def images(self, latents: torch.Tensor, rows: Sequence[int]) -> list[np.ndarray]:
        """One preview per row: uint8, shape (height, width, 3), RGB, no side longer than `PREVIEW_SIDE`.

        The list is empty when a preview is not possible. latents: of the whole batch, after a step.
        """
        if self.disabled:
            return []
        if self.predicted is not None and self.predicted.shape == latents.shape:
            latents = self.predicted
        latents = self._unpacked(latents[list(rows)])
        if latents.ndim != 4:
            return []
        try:
            pixels = accelerator.run_on(latents.device, lambda: self._decode(latents), items=len(rows))
        except ModelOutOfMemoryError:
            self.disabled = True
            return []
        if not np.isfinite(pixels).all():
            return []
        return list((pixels * 255).round().astype(np.uint8))

    def _unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents with the shape (n, channels, height, width); in other forms than the known ones, unchanged."""
        pipeline = self.pipeline
        if latents.ndim == 3 and hasattr(pipeline, "_unpatchify_latents"):  # FLUX.2
            patch = 2 * pipeline.vae_scale_factor
            latents = latents.mT.reshape(len(latents), -1, self.height // patch, self.width // patch)
            statistics = pipeline.vae.bn
            deviation = (statistics.running_var + pipeline.vae.config.batch_norm_eps).sqrt()
            latents = latents * deviation.to(latents.dtype).view(1, -1, 1, 1)
            latents = latents + statistics.running_mean.to(latents.dtype).view(1, -1, 1, 1)
            latents = pipeline._unpatchify_latents(latents)
        elif latents.ndim == 3 and hasattr(pipeline, "_unpack_latents"):
            unpack, options = pipeline._unpack_latents, {"height": self.height, "width": self.width}
            if "vae_scale_factor" in inspect.signature(unpack).parameters:
                options["vae_scale_factor"] = pipeline.vae_scale_factor
            latents = unpack(latents, **options)
        if latents.ndim == 5 and latents.shape[2] == 1:  # one frame
            latents = latents[:, :, 0]
        return latents

    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        """Make the latents small, so that decoding is cheap, then decode: float32 in [0, 1], (n, height, width, 3)."""
        vae = self.pipeline.vae
        largest = max(1, PREVIEW_SIDE // self.pipeline.vae_scale_factor)
        height, width = latents.shape[-2:]
        if max(height, width) > largest:
            scale = largest / max(height, width)
            size = (max(1, int(height * scale)), max(1, int(width * scale)))
            latents = functional.interpolate(latents.float(), size=size, mode="area")
        config = vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        scale = config.get("scaling_factor") or 1
        if mean is not None and std is not None:
            latents = latents * latents.new_tensor(std).view(1, -1, 1, 1)
            latents = latents / scale + latents.new_tensor(mean).view(1, -1, 1, 1)
        else:
            latents = latents / scale + (config.get("shift_factor") or 0)
        takes_frames = "temperal_downsample" in config  # video VAEs, by the spelling of diffusers
        latents = latents.unsqueeze(2) if takes_frames else latents
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        decoded = decoded[:, :, 0] if takes_frames else decoded
        pixels: np.ndarray = (decoded.float() / 2 + 0.5).clamp(0, 1).cpu().numpy()
        return on_white(pixels.transpose(0, 2, 3, 1)) if pixels.shape[1] == 4 else pixels.transpose(0, 2, 3, 1)

    def record_predictions(self, scheduler: SchedulerMixin) -> None:
        """Replace the scheduler's `step` by one that also records the predicted latents in `predicted`.

        The original is not restored, because each call has its own scheduler.
        """
        step: Callable[..., Any] = scheduler.step

        @wraps(step)  # pipelines read the signature to see whether a step takes a generator
        def recorded_step(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = step(model_output, *args, **kwargs)
            self.predicted = _predicted_latents(scheduler, model_output, result)
            return result

        scheduler.step = recorded_step


def _predicted_latents(scheduler: SchedulerMixin, model_output: torch.Tensor, result: Any) -> torch.Tensor | None:
    """Clean latents that a step predicted: returned by it, stored by the scheduler, or computed from its velocity."""
    if isinstance(result, tuple) and len(result) > 1 and isinstance(result[1], torch.Tensor):
        return result[1]
    stores_them = scheduler.config.get("predict_x0") or str(scheduler.config.get("algorithm_type")).endswith("++")
    if stores_them and getattr(scheduler, "model_outputs", None):
        stored: torch.Tensor | None = scheduler.model_outputs[-1]
        return stored
    if hasattr(scheduler, "scale_noise") and isinstance(result, tuple):  # flow matching: a straight line to the end
        clean: torch.Tensor = result[0] - scheduler.sigmas[scheduler.step_index] * model_output
        return clean
    return None
